// How a linear layer is cut into pieces; the pieces themselves are computed by the kernels of an instruction set.
//
//   1. The rows become digits, in tiles of four rows.
//   2. The outputs are dealt to the threads in tiles of 16. For few rows, two such tiles are read side by side from memory,
//      and each group of weights meets all rows while the next ones come. For more, a tile goes through its inputs in
//      blocks that fit the first-level cache, and for each block through all rows, up to 512 at a time: weights come from
//      memory once for so many.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace bluejay {
namespace {

constexpr int64_t kBlockGroups = 32;  // 1,024 inputs: 16 KiB of weights, half of a first-level cache
constexpr int64_t kMaxRows = 512;     // worked on at a time, so that digits and sums stay in the outer caches
constexpr int64_t kMaxDigits = 4 << 20;  // of those rows, in bytes of one digit each
constexpr int64_t kLine = 64;         // bytes of a cache line
constexpr int64_t kFewTiles = 4;      // of rows: beyond 16, arithmetic takes far longer than memory either way
constexpr int64_t kTurn = 8;          // tiles of outputs that a thread takes at a time, if each is short work

const LinearKernels& kernels() {
#ifdef BLUEJAY_X86
    if (active() == Isa::avx512_vnni) return linear_avx512;
    if (active() == Isa::avx2) return linear_avx2;
#endif
    return linear_portable;
}

int64_t num_tiles(const LinearArgs& args) { return (args.out_features + kTileOutputs - 1) / kTileOutputs; }

const uint8_t* end_of_weights(const LinearArgs& args) {
    return args.weight + num_tiles(args) * args.padded_in * kTileOutputs * args.bits / 8;
}

// Room for so many elements. Never fewer than before: making them zeros once more takes time.
template <class T>
void grow(std::vector<T>& elements, int64_t count) {
    if (static_cast<int64_t>(elements.size()) < count) elements.resize(count);
}

// The digits of some rows. Blocks of inputs lie one after the other; in a block, tiles of rows; in a tile, quads (or
// groups); there, the rows side by side. What a tile kernel reads is contiguous, and so is what is read after it.
class TiledDigits {
public:
    void quantize(const LinearKernels& kernel, const LinearArgs& args, int64_t first_row, int64_t rows) {
        rows_ = rows;
        groups_ = args.padded_in / kGroup;
        tiles_ = (rows + kTileRows - 1) / kTileRows;
        block_ = few() ? groups_ : kBlockGroups;
        for (auto* digits : {&low_, &high_}) grow(*digits, rows * groups_ * kGroupQuads);
        for (auto* starts : {&low_start_, &high_start_}) grow(*starts, rows * groups_);
        grow(scale_, rows * groups_);
        grow(wide_, tiles_ * groups_);
        const auto one = [&](int64_t tile) { quantize_tile(kernel, args, first_row, tile); };
        if (tiles_ == 1) one(0);  // too little work to wake anybody
        else parallel_for(tiles_, one);
    }

    // Whether the rows are so few that weights are read from memory for all of them, and not block by block.
    bool few() const { return tiles_ <= kFewTiles; }
    int64_t tiles() const { return tiles_; }
    int64_t groups() const { return groups_; }
    int tile_rows(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kTileRows, rows_ - tile * kTileRows)); }

    // The digits of a tile of rows in the block that begins at first_group.
    Digits at(int64_t tile, int64_t first_group) const {
        const int64_t groups = std::min(block_, groups_ - first_group);
        const int64_t group = first_group * rows_ + tile * kTileRows * groups;
        const int64_t quad = group * kGroupQuads;
        return {&low_[quad],    &high_[quad], &low_start_[group], &high_start_[group],
                &scale_[group], &wide_[tile * groups_ + first_group]};
    }

private:
    // A row's digits as the kernel leaves them.
    struct Row {
        std::vector<int8_t> low, high;
        std::vector<int32_t> low_start, high_start;
        std::vector<float> scale;
        std::vector<uint8_t> wide;

        RowDigits room(int64_t groups) {
            for (auto* digits : {&low, &high}) grow(*digits, groups * kGroup);
            for (auto* starts : {&low_start, &high_start}) grow(*starts, groups);
            grow(scale, groups);
            grow(wide, groups);
            return {low.data(), high.data(), low_start.data(), high_start.data(), scale.data(), wide.data()};
        }
    };

    void quantize_tile(const LinearKernels& kernel, const LinearArgs& args, int64_t first_row, int64_t tile) {
        thread_local Row scratch[kTileRows];
        const int num_rows = tile_rows(tile);
        for (int r = 0; r < num_rows; ++r) {
            const float* x = args.x + (first_row + tile * kTileRows + r) * args.in_features;
            kernel.quantize_row(x, args.in_features, args.padded_in, args.bits, scratch[r].room(groups_));
        }
        for (int64_t first = 0; first < groups_; first += block_) {
            const int64_t block = first * rows_ + tile * kTileRows * std::min(block_, groups_ - first);
            for (int64_t g = first; g < std::min(first + block_, groups_); ++g)
                interleave(scratch, num_rows, g, block + (g - first) * num_rows, tile);
        }
    }

    // Bring the rows' digits of one group side by side, at `to`.
    void interleave(const Row* scratch, int num_rows, int64_t g, int64_t to, int64_t tile) {
        uint8_t& wide = wide_[tile * groups_ + g] = 0;
        for (int r = 0; r < num_rows; ++r) {
            const Row& row = scratch[r];
            place(&row.low[g * kGroup], &low_[to * kGroupQuads + r], num_rows);
            low_start_[to + r] = row.low_start[g];
            scale_[to + r] = row.scale[g];
            if (!row.wide[g]) continue;
            wide |= static_cast<uint8_t>(1 << r);
            place(&row.high[g * kGroup], &high_[to * kGroupQuads + r], num_rows);
            high_start_[to + r] = row.high_start[g];
        }
    }

    static void place(const int8_t* digits, int32_t* to, int stride) {
        for (int quad = 0; quad < kGroupQuads; ++quad) std::memcpy(to + quad * stride, digits + 4 * quad, 4);
    }

    int64_t rows_ = 0, tiles_ = 0, groups_ = 0, block_ = 0;
    std::vector<int32_t> low_, high_, low_start_, high_start_;
    std::vector<float> scale_;
    std::vector<uint8_t> wide_;
};

// The weights of one tile of outputs, block by block, for several tiles of rows.
class OutputTile {
public:
    OutputTile(const LinearKernels& kernel, const LinearArgs& args, const TiledDigits& digits)
        : kernel_(kernel), args_(args), digits_(digits), group_bytes_(kTileOutputs * kGroup * args.bits / 8) {}

    // Add weight · digits over all inputs to sums [rows][16].
    void multiply(int64_t tile, float* sums) {
        const int64_t groups = digits_.groups();
        const uint8_t* weight = args_.weight + tile * groups * group_bytes_;
        const int repeat = args_.group_size / kGroup;
        const uint16_t* scales = args_.scales + tile * (groups / repeat) * kTileOutputs;
        for (int64_t first = 0; first < groups; first += kBlockGroups) {
            const int64_t count = std::min(kBlockGroups, groups - first);
            kernel_.widen_scales(scales + first / repeat * kTileOutputs, count / repeat, repeat, scales_);
            const uint8_t* block = weight + first * group_bytes_;
            // Four bits are spread once for all rows.
            if (args_.bits == 4) kernel_.unpack_int4(block, count * kGroupQuads / 2, unpacked_);
            multiply_block(args_.bits == 4 ? unpacked_ : block, block + count * group_bytes_, first, count, sums);
        }
    }

private:
    void multiply_block(const uint8_t* weight, const uint8_t* next, int64_t first, int64_t count, float* sums) {
        const auto& kernel = args_.bits == 8 ? kernel_.int8 : kernel_.int4;
        // While this block is worked on, the next one is fetched, evenly.
        const int64_t calls = digits_.tiles() * count;
        const int lines = static_cast<int>((count * group_bytes_ / kLine + calls - 1) / calls);
        for (int64_t rows = 0; rows < digits_.tiles(); ++rows) {
            const uint8_t* from = next + rows * count * lines * kLine;
            const bool inside = from + count * lines * kLine <= end_of_weights(args_);
            kernel[digits_.tile_rows(rows) - 1](weight, digits_.at(rows, first), scales_, count,
                                               sums + rows * kTileRows * kTileOutputs, {from, inside ? lines : 0});
        }
    }

    const LinearKernels& kernel_;
    const LinearArgs& args_;
    const TiledDigits& digits_;
    const int64_t group_bytes_;
    alignas(64) float scales_[kBlockGroups * kTileOutputs];
    alignas(64) uint8_t unpacked_[kBlockGroups * kGroup * kTileOutputs];
};

void write_out(const LinearArgs& args, int64_t tile, int64_t first_row, int64_t rows, const float* sums) {
    const int64_t first = tile * kTileOutputs;
    const int64_t count = std::min<int64_t>(kTileOutputs, args.out_features - first);
    float bias[kTileOutputs] = {};
    if (args.bias) std::copy_n(args.bias + first, count, bias);
    for (int64_t row = 0; row < rows; ++row, sums += kTileOutputs) {
        float* out = args.out + (first_row + row) * args.out_features + first;
        // A whole tile's count is known while compiling: no loop, no call.
        if (count == kTileOutputs)
            for (int i = 0; i < kTileOutputs; ++i) out[i] = sums[i] + bias[i];
        else
            for (int64_t i = 0; i < count; ++i) out[i] = sums[i] + bias[i];
    }
}

// Few rows: weights are read once, as fast as memory gives them, and each group of them is multiplied by all rows while
// the next ones come.
void stream(const LinearKernels& kernel, const LinearArgs& args, const TiledDigits& digits, int64_t first_row, int64_t rows) {
    const int64_t tiles = num_tiles(args), groups = digits.groups();
    const int repeat = args.group_size / kGroup, full = static_cast<int>(digits.tiles() - 1);
    const auto multiply = (args.bits == 8 ? kernel.int8_stream : kernel.int4_stream)[digits.tile_rows(full) - 1];
    Digits x[kFewTiles];
    for (int i = 0; i <= full; ++i) x[i] = digits.at(i, 0);
    // Several strips to a turn, but some turns for each thread.
    const int64_t turn = std::clamp(tiles / (4 * num_threads()) / kStreams * kStreams, int64_t{kStreams}, kTurn);
    parallel_for((tiles + turn - 1) / turn, [&](int64_t index) {
        const int64_t last = std::min(tiles, (index + 1) * turn);
        for (int64_t tile = index * turn; tile < last; tile += kStreams) {
            const int count = static_cast<int>(std::min<int64_t>(kStreams, last - tile));
            alignas(64) float sums[kStreams * kFewTiles * kTileRows * kTileOutputs];
            std::fill_n(sums, count * rows * kTileOutputs, 0.0f);
            multiply({args.weight + tile * groups * kTileOutputs * kGroup * args.bits / 8,
                      args.scales + tile * groups / repeat * kTileOutputs, groups, repeat, count, end_of_weights(args)},
                     x, full, sums);
            for (int t = 0; t < count; ++t) write_out(args, tile + t, first_row, rows, sums + t * rows * kTileOutputs);
        }
    });
}

// Several tiles of rows: weights come from memory once, and from the first-level cache for each of them.
void multiply(const LinearKernels& kernel, const LinearArgs& args, const TiledDigits& digits, int64_t first_row,
              int64_t rows) {
    parallel_for(num_tiles(args), [&](int64_t tile) {
        thread_local std::vector<float> sums;
        sums.assign(rows * kTileOutputs, 0.0f);
        OutputTile(kernel, args, digits).multiply(tile, sums.data());
        write_out(args, tile, first_row, rows, sums.data());
    });
}

}  // namespace

void linear(const LinearArgs& args) {
    thread_local TiledDigits digits;  // kept from call to call: allocating megabytes anew costs a page fault each 4 KiB
    const LinearKernels& kernel = kernels();
    const int64_t at_once = std::clamp(kMaxDigits / args.padded_in / kTileRows * kTileRows, int64_t{kTileRows}, kMaxRows);
    for (int64_t first_row = 0; first_row < args.rows; first_row += at_once) {
        const int64_t rows = std::min(at_once, args.rows - first_row);
        digits.quantize(kernel, args, first_row, rows);
        if (digits.few()) stream(kernel, args, digits, first_row, rows);
        else multiply(kernel, args, digits, first_row, rows);
    }
}

}  // namespace bluejay
