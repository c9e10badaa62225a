// Elementwise kernels for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

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
    using Heads = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
    using Turns = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
    m.def(
        "rotate_",
        [](Heads x, Turns turns) {
            if (turns.shape(0) != x.shape(0) || turns.shape(2) != 2 || 2 * turns.shape(1) > x.shape(2))
                throw std::invalid_argument("turns must be [tokens, pairs, 2], for the tokens of x and pairs within a head");
            float* data = x.data();
            const float* by = turns.data();
            const auto tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1));
            const auto head_dim = static_cast<int64_t>(x.shape(2)), pairs = static_cast<int64_t>(turns.shape(1));
            const nb::gil_scoped_release released;
            rotate(data, by, tokens, heads, head_dim, pairs);
        },
        nb::arg("x").noconvert(), nb::arg("turns").noconvert());
}

}  // namespace bluejay
