#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "bandwidth.h"

namespace nb = nanobind;

namespace bluejay {
namespace {

using Buffer = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int64_t checked_sum(const Buffer& buffer) {
    const auto num_bytes = static_cast<int64_t>(buffer.size());
    if (num_bytes % kLine) {
        throw std::invalid_argument("the buffer has " + std::to_string(num_bytes) + " bytes, expected a multiple of " +
                                    std::to_string(kLine));
    }
    nb::gil_scoped_release released;
    return static_cast<int64_t>(read_sum(buffer.data(), num_bytes));
}

}  // namespace

void bind_bandwidth(nb::module_& m) { m.def("read_sum", &checked_sum, nb::arg("buffer").noconvert()); }

}  // namespace bluejay
