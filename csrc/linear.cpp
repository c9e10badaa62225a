// How a linear layer is cut into pieces; the pieces themselves are computed by the kernels of an instruction set.
//
//   1. The rows become digits, in tiles of four rows.
//   2. The outputs are dealt to the threads in tiles of 16. A tile of outputs goes through its inputs in blocks that fit
//      the first-level cache, and for each block through all rows: weights come from memory once, whatever the rows.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kBlockGroups = 32;  // 1,024 inputs: 16 KiB of weights, half of a first-level cache
constexpr int64_t kMaxRows = 512;     // rows whose digits and sums stay in the outer caches from tile to tile
constexpr int64_t kShortly = 2048;    // bytes: what a core asks for in the time in which memory answers
constexpr int64_t kLine = 64;         // bytes of a cache line

const LinearKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return linear_avx512;
    if (active() == Isa::avx2) return linear_avx2;
#endif
    return linear_portable;
}

// Where a group's sum starts, so that the offset in the stored weights is taken out.
int32_t sum_start(const int8_t* digits, int bits) {
    int32_t front = 0, back = 0;  // inputs 0 and 1, inputs 2 and 3 of each quad: int4 sums them in two halves
    for (int i = 0; i < kGroup; i += 4) {
        front += digits[i] + digits[i + 1];
        back += digits[i + 2] + digits[i + 3];
    }
    if (bits == 8) return -112 * (front + back);
    return static_cast<int32_t>(static_cast<uint32_t>(-8 * back) << 16 | static_cast<uint16_t>(-8 * front));
}

// The digits of some rows. Blocks of inputs lie one after the other; in a block, tiles of rows; in a tile, quads (or
// groups); there, the rows side by side. What a tile kernel reads is contiguous, and so is what is read after it.
class RowDigits {
public:
    void quantize(const LinearKernels& kernel, const LinearArgs& args, int64_t first_row, int64_t rows) {
        rows_ = rows;
        groups_ = args.padded_in / kGroup;
        tiles_ = (rows + kTileRows - 1) / kTileRows;
        for (auto* digits : {&low_, &high_}) digits->resize(rows * groups_ * kGroupQuads);
        for (auto* starts : {&low_start_, &high_start_}) starts->resize(rows * groups_);
        scale_.resize(rows * groups_);
        wide_.resize(tiles_ * groups_);
        const auto one = [&](int64_t tile) { quantize_tile(kernel, args, first_row, tile); };
        if (tiles_ == 1) one(0);  // too little work to wake anybody
        else parallel_for(tiles_, one);
    }

    int64_t tiles() const { return tiles_; }
    int64_t groups() const { return groups_; }
    int tile_rows(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kTileRows, rows_ - tile * kTileRows)); }

    // The digits of a tile of rows in the block that begins at first_group.
    Digits at(int64_t tile, int64_t first_group) const {
        const int64_t groups = std::min(kBlockGroups, groups_ - first_group);
        const int64_t group = first_group * rows_ + tile * kTileRows * groups;
        const int64_t quad = group * kGroupQuads;
        return {&low_[quad],    &high_[quad], &low_start_[group], &high_start_[group],
                &scale_[group], &wide_[tile * groups_ + first_group]};
    }

private:
    struct Row {
        std::vector<int8_t> low, high;
        std::vector<float> scale;
        std::vector<uint8_t> wide;
    };

    void quantize_tile(const LinearKernels& kernel, const LinearArgs& args, int64_t first_row, int64_t tile) {
        thread_local Row scratch[kTileRows];
        const int num_rows = tile_rows(tile);
        for (int r = 0; r < num_rows; ++r) {
            Row& row = scratch[r];
            row.low.resize(args.padded_in);
            row.high.resize(args.padded_in);
            row.scale.resize(groups_);
            row.wide.resize(groups_);
            kernel.quantize_row(args.x + (first_row + tile * kTileRows + r) * args.in_features, args.in_features,
                                args.padded_in, args.bits, row.low.data(), row.high.data(), row.scale.data(),
                                row.wide.data());
        }
        for (int64_t first = 0; first < groups_; first += kBlockGroups) {
            const int64_t block = first * rows_ + tile * kTileRows * std::min(kBlockGroups, groups_ - first);
            for (int64_t g = first; g < std::min(first + kBlockGroups, groups_); ++g)
                interleave(scratch, num_rows, g, block + (g - first) * num_rows, tile, args.bits);
        }
    }

    // Bring the rows' digits of one group side by side, at `to`.
    void interleave(const Row* scratch, int num_rows, int64_t g, int64_t to, int64_t tile, int bits) {
        uint8_t& wide = wide_[tile * groups_ + g] = 0;
        for (int r = 0; r < num_rows; ++r) {
            const Row& row = scratch[r];
            place(&row.low[g * kGroup], &low_[to * kGroupQuads + r], num_rows);
            low_start_[to + r] = sum_start(&row.low[g * kGroup], bits);
            scale_[to + r] = row.scale[g];
            if (!row.wide[g]) continue;
            wide |= static_cast<uint8_t>(1 << r);
            place(&row.high[g * kGroup], &high_[to * kGroupQuads + r], num_rows);
            high_start_[to + r] = sum_start(&row.high[g * kGroup], bits);
        }
    }

    static void place(const int8_t* digits, int32_t* to, int stride) {
        for (int quad = 0; quad < kGroupQuads; ++quad) std::memcpy(to + quad * stride, digits + 4 * quad, 4);
    }

    int64_t rows_ = 0, tiles_ = 0, groups_ = 0;
    std::vector<int32_t> low_, high_, low_start_, high_start_;
    std::vector<float> scale_;
    std::vector<uint8_t> wide_;
};

// The weights of one tile of outputs, block by block.
class OutputTile {
public:
    OutputTile(const LinearKernels& kernel, const LinearArgs& args, const RowDigits& digits)
        : kernel_(kernel), args_(args), digits_(digits), group_bytes_(kTileOutputs * kGroup * args.bits / 8),
          // For one tile of rows, four bits are spread where they are used; for more, once for all of them.
          unpack_(args.bits == 4 && digits.tiles() > 1) {}

    // Add weight · digits over all inputs to sums [rows][16].
    void multiply(int64_t tile, float* sums) {
        const int64_t groups = digits_.groups();
        const uint8_t* weight = args_.weight + tile * groups * group_bytes_;
        const uint8_t* end = args_.weight + (args_.out_features + kTileOutputs - 1) / kTileOutputs * groups * group_bytes_;
        const int repeat = args_.group_size / kGroup;
        const uint16_t* scales = args_.scales + tile * (groups / repeat) * kTileOutputs;
        for (int64_t first = 0; first < groups; first += kBlockGroups) {
            const int64_t count = std::min(kBlockGroups, groups - first);
            kernel_.widen_scales(scales + first / repeat * kTileOutputs, count, repeat, scales_);
            const uint8_t* block = weight + first * group_bytes_;
            if (unpack_) kernel_.unpack_int4(block, count * kGroupQuads / 2, unpacked_);
            multiply_block(unpack_ ? unpacked_ : block, block + count * group_bytes_, end, first, count, sums);
        }
    }

private:
    void multiply_block(const uint8_t* weight, const uint8_t* next, const uint8_t* end, int64_t first, int64_t count,
                        float* sums) {
        const auto& kernel = args_.bits == 8 ? kernel_.int8 : unpack_ ? kernel_.int4 : kernel_.int4_packed;
        // While this block is worked on, the next one is fetched, evenly. With one tile of rows, weights are read once, and
        // what comes shortly is fetched.
        const bool once = digits_.tiles() == 1;
        const int64_t calls = digits_.tiles() * count;
        const int lines = static_cast<int>((count * group_bytes_ / kLine + calls - 1) / calls);
        for (int64_t rows = 0; rows < digits_.tiles(); ++rows) {
            const uint8_t* from = once ? next - count * group_bytes_ + kShortly : next + rows * count * lines * kLine;
            const bool inside = from + count * lines * kLine <= end;
            kernel[digits_.tile_rows(rows) - 1](weight, digits_.at(rows, first), scales_, count,
                                               sums + rows * kTileRows * kTileOutputs, {from, inside ? lines : 0, once});
        }
    }

    const LinearKernels& kernel_;
    const LinearArgs& args_;
    const RowDigits& digits_;
    const int64_t group_bytes_;
    const bool unpack_;
    alignas(64) float scales_[kBlockGroups * kTileOutputs];
    alignas(64) uint8_t unpacked_[kBlockGroups * kGroup * kTileOutputs];
};

void write_out(const LinearArgs& args, int64_t tile, int64_t first_row, int64_t rows, const float* sums) {
    const int64_t first = tile * kTileOutputs;
    const int64_t count = std::min<int64_t>(kTileOutputs, args.out_features - first);
    for (int64_t row = 0; row < rows; ++row) {
        float* out = args.out + (first_row + row) * args.out_features + first;
        const float* sum = sums + row * kTileOutputs;
        for (int64_t i = 0; i < count; ++i) out[i] = args.bias ? sum[i] + args.bias[first + i] : sum[i];
    }
}

}  // namespace

void linear(const LinearArgs& args) {
    thread_local RowDigits digits;  // kept from call to call: allocating megabytes anew costs a page fault each 4 KiB
    RowDigits& shared = digits;     // a lambda would see the worker's own
    const LinearKernels& kernel = kernels();
    const int64_t tiles = (args.out_features + kTileOutputs - 1) / kTileOutputs;
    for (int64_t first_row = 0; first_row < args.rows; first_row += kMaxRows) {
        const int64_t rows = std::min(kMaxRows, args.rows - first_row);
        shared.quantize(kernel, args, first_row, rows);
        // Few rows make a tile short work: several to one turn.
        const int64_t turn = rows > 2 * kTileRows ? 1 : 4;
        parallel_for((tiles + turn - 1) / turn, [&](int64_t index) {
            thread_local std::vector<float> sums;
            OutputTile weights(kernel, args, shared);
            for (int64_t tile = index * turn; tile < std::min(tiles, (index + 1) * turn); ++tile) {
                sums.assign(rows * kTileOutputs, 0.0f);
                weights.multiply(tile, sums.data());
                write_out(args, tile, first_row, rows, sums.data());
            }
        });
    }
}

}  // namespace bluejay
