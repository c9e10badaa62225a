// Elementwise kernels for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "check.h"
#include "elementwise.h"
#include "record.h"

namespace nb = nanobind;

namespace bluejay {

namespace {

using Numbers = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Given = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Parameter = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Heads = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Turns = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void checked_gelu_new(Numbers x) {
    submit([x = x.data(), count = static_cast<int64_t>(x.size())] { gelu_new(x, count); });
}

void checked_rotate(Heads x, Turns turns) {
    BLUEJAY_CHECK(turns.shape(0) == x.shape(0) && turns.shape(2) == 2 && 2 * turns.shape(1) <= x.shape(2),
                  "turns must be [tokens, pairs, 2], for the tokens of x and pairs within a head");
    const auto tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1));
    const auto head_dim = static_cast<int64_t>(x.shape(2)), pairs = static_cast<int64_t>(turns.shape(1));
    submit([x = x.data(), by = turns.data(), tokens, heads, head_dim, pairs] {
        rotate(x, by, tokens, heads, head_dim, pairs);
    });
}

void checked_layer_norm(Numbers out, Given x, Parameter weight, Parameter bias, double eps) {
    const size_t width = weight.shape(0);
    BLUEJAY_CHECK(width > 0 && bias.shape(0) == width, "weight and bias must be of one size, at least 1");
    BLUEJAY_CHECK(x.ndim() > 0 && x.shape(x.ndim() - 1) == width && out.size() == x.size(),
                  "the last dim of x and out must be weight's " + std::to_string(width));
    submit([out = out.data(), x = x.data(), weight = weight.data(), bias = bias.data(), eps = static_cast<float>(eps),
            rows = static_cast<int64_t>(x.size() / width), width = static_cast<int64_t>(width)] {
        layer_norm(x, weight, bias, eps, rows, width, out);
    });
}

void checked_add(Numbers x, Given y) {
    BLUEJAY_CHECK(x.size() == y.size(), "x and y must be of one size");
    submit([x = x.data(), y = y.data(), count = static_cast<int64_t>(x.size())] { add(x, y, count); });
}

}  // namespace

void bind_elementwise(nb::module_& m) {
    m.def("gelu_new_", &checked_gelu_new, nb::arg("x").noconvert());
    m.def("rotate_", &checked_rotate, nb::arg("x").noconvert(), nb::arg("turns").noconvert());
    m.def("layer_norm", &checked_layer_norm, nb::arg("out").noconvert(), nb::arg("x").noconvert(),
          nb::arg("weight").noconvert(), nb::arg("bias").noconvert(), nb::arg("eps"));
    m.def("add_", &checked_add, nb::arg("x").noconvert(), nb::arg("y").noconvert());
}

}  // namespace bluejay
