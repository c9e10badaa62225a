// Elementwise kernels for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "elementwise.h"

namespace nb = nanobind;

namespace bluejay {

void bind_elementwise(nb::module_& m) {
    using namespace nb::literals;
    using Numbers = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
    m.def(
        "gelu_new_",
        [](Numbers x) {
            float* data = x.data();
            const auto count = static_cast<int64_t>(x.size());
            const nb::gil_scoped_release released;
            gelu_new(data, count);
        },
        nb::arg("x").noconvert());
}

}  // namespace bluejay
