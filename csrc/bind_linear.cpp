#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <string>

#include "check.h"
#include "linear.h"
#include "linear_float.h"
#include "record.h"

namespace nb = nanobind;

namespace bluejay {
namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Packed = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using FloatTiles = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

std::string text(int64_t value) { return std::to_string(value); }

struct Sizes {
    int64_t rows, in_features, out_features;
};

Sizes checked_sizes(const Output& out, const Floats& x, const std::optional<Floats>& bias) {
    BLUEJAY_CHECK(x.ndim() >= 1 && out.ndim() == x.ndim(), "out and x must have the same number of dims, at least one");
    const auto in_features = static_cast<int64_t>(x.shape(x.ndim() - 1));
    const auto out_features = static_cast<int64_t>(out.shape(out.ndim() - 1));
    BLUEJAY_CHECK(in_features > 0 && out_features > 0, "x and out must have features in their last dim");
    const auto rows = static_cast<int64_t>(x.size()) / in_features;
    BLUEJAY_CHECK(static_cast<int64_t>(out.size()) == rows * out_features, "out must have the rows of x");
    if (bias) {
        BLUEJAY_CHECK(bias->ndim() == 1 && static_cast<int64_t>(bias->shape(0)) == out_features,
                      "bias must be [" + text(out_features) + "]");
    }
    return {rows, in_features, out_features};
}

void check_tiles(int64_t tiles, int64_t out_features) {
    static_assert(kTileOutputs == 16 && kFloatTile == 16, "what the message says");
    BLUEJAY_CHECK(tiles == (out_features + 15) / 16,
            "weight has " + text(tiles) + " tiles of 16 outputs, which are not those of out_features " + text(out_features));
}

// Write x · weightᵀ + bias to out, [..., out_features]; see linear.h for how weight and scales lie.
void checked_linear(int bits, Output out, Floats x, Packed weight, Scales scales, std::optional<Floats> bias) {
    BLUEJAY_CHECK(bits == 8 || bits == 4, "bits is " + text(bits) + ", expected 8 or 4");
    const auto [rows, in_features, out_features] = checked_sizes(out, x, bias);
    const auto tiles = static_cast<int64_t>(weight.shape(0));
    BLUEJAY_CHECK(weight.shape(2) == 64, "weight must be [tiles, steps, 64], its last dim is " + text(weight.shape(2)));
    check_tiles(tiles, out_features);
    const auto padded_in = static_cast<int64_t>(weight.shape(1)) * (bits == 8 ? 4 : 8);
    BLUEJAY_CHECK((scales.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1}),
            "scales must be float16");
    const auto groups = static_cast<int64_t>(scales.shape(1));
    BLUEJAY_CHECK(static_cast<int64_t>(scales.shape(0)) == tiles && scales.shape(2) == kTileOutputs && groups > 0,
            "scales must be [" + text(tiles) + ", groups, 16]");
    const int64_t group_size = padded_in / groups;
    BLUEJAY_CHECK(padded_in % groups == 0 && (group_size == 32 || group_size == 64),
            "weight has " + text(padded_in) + " inputs and scales " + text(groups) + " groups: expected groups of 32 or 64");
    BLUEJAY_CHECK(in_features <= padded_in && padded_in - in_features < group_size,
            "x has " + text(in_features) + " features, weight is for " + text(padded_in - group_size + 1) + " to " + text(padded_in));
    const LinearArgs args{bits,
                          static_cast<int>(group_size),
                          x.data(),
                          rows,
                          in_features,
                          padded_in,
                          weight.data(),
                          static_cast<const uint16_t*>(scales.data()),
                          bias ? bias->data() : nullptr,
                          out.data(),
                          out_features};
    submit([args] { linear(args); });
}

// The same with float32 weights; see linear_float.h for how they lie.
void checked_linear_float32(Output out, Floats x, FloatTiles weight, std::optional<Floats> bias) {
    const auto [rows, in_features, out_features] = checked_sizes(out, x, bias);
    const auto tiles = static_cast<int64_t>(weight.shape(0));
    BLUEJAY_CHECK(weight.shape(2) == kFloatTile,
                  "weight must be [tiles, inputs, 16], its last dim is " + text(weight.shape(2)));
    check_tiles(tiles, out_features);
    BLUEJAY_CHECK(static_cast<int64_t>(weight.shape(1)) == in_features,
                  "x has " + text(in_features) + " features, weight is for " + text(weight.shape(1)));
    const FloatArgs args{
        x.data(), rows, in_features, weight.data(), bias ? bias->data() : nullptr, out.data(), out_features};
    submit([args] { linear_float32(args); });
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("linear_float32", &checked_linear_float32, nb::arg("out").noconvert(), nb::arg("x").noconvert(),
          nb::arg("weight").noconvert(), nb::arg("bias").noconvert().none());
    m.def("linear", &checked_linear, nb::arg("bits"), nb::arg("out").noconvert(), nb::arg("x").noconvert(),
          nb::arg("weight").noconvert(), nb::arg("scales").noconvert(), nb::arg("bias").noconvert().none());
}

}  // namespace bluejay
