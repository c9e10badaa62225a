// paged_attention and write_kv for Python: everything is checked here, the kernels trust what they get.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "check.h"
#include "record.h"

namespace nb = nanobind;

namespace bluejay {
namespace {

using Array = nb::ndarray<nb::ro>;

template <typename Numbers>
std::string listed(const Numbers& numbers) {
    std::string text;
    for (auto number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
    return "[" + text + "]";
}

std::string described(const Array& array) {
    const nb::dlpack::dtype type = array.dtype();
    const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
    const char* kind = code == nb::dlpack::dtype_code::Int      ? "int"
                       : code == nb::dlpack::dtype_code::UInt   ? "uint"
                       : code == nb::dlpack::dtype_code::Float  ? "float"
                       : code == nb::dlpack::dtype_code::Bfloat ? "bfloat"
                       : code == nb::dlpack::dtype_code::Bool   ? "bool"
                                                                : "a type of ";
    return kind + std::to_string(type.bits) + " " +
           listed(std::vector<int64_t>(array.shape_ptr(), array.shape_ptr() + array.ndim()));
}

bool is(const Array& array, nb::dlpack::dtype_code code, int bits, size_t dims) {
    const nb::dlpack::dtype type = array.dtype();
    return type.code == static_cast<uint8_t>(code) && type.bits == bits && type.lanes == 1 && array.ndim() == dims;
}

bool is_int(const Array& array, int bits, size_t dims) { return is(array, nb::dlpack::dtype_code::Int, bits, dims); }

bool is_float32(const Array& array, size_t dims) { return is(array, nb::dlpack::dtype_code::Float, 32, dims); }

bool same_shape(const Array& a, const Array& b) {
    return a.ndim() == b.ndim() && std::equal(a.shape_ptr(), a.shape_ptr() + a.ndim(), b.shape_ptr());
}

// Whether the last dims lie as in C, from dim `first` on.
bool is_dense(const Array& array, size_t first = 0) {
    int64_t expected = 1;
    for (size_t dim = array.ndim(); dim-- > first;) {
        if (array.shape(dim) != 1 && array.stride(dim) != expected) return array.size() == 0;
        expected *= static_cast<int64_t>(array.shape(dim));
    }
    return true;
}

void check_memory(const Array& array, const char* name, bool dense) {
    BLUEJAY_CHECK(array.device_type() == nb::device::cpu::value, std::string(name) + " is not in the CPU's memory; move it there");
    BLUEJAY_CHECK(!dense || is_dense(array), std::string(name) + " is not contiguous; call contiguous()");
}

void check_tokens(const Array& x, const char* name) {
    BLUEJAY_CHECK(is_float32(x, 3), std::string(name) + " is " + described(x) + ", expected float32 [T, H, K]");
    BLUEJAY_CHECK(x.shape(1) > 0 && x.shape(2) > 0,
          std::string(name) + " is " + described(x) + ", expected at least one head of at least one dim");
    check_memory(x, name, true);
}

// Check a cache against this step's tensor x.
void check_cache(const Array& cache, const char* name, const Array& x, const char* x_name) {
    const auto whole = [&] { return std::string(name) + " is " + described(cache); };
    const bool int8 = is_int(cache, 8, 4);
    BLUEJAY_CHECK((int8 || is_float32(cache, 4) || is(cache, nb::dlpack::dtype_code::Float, 16, 4) ||
           is(cache, nb::dlpack::dtype_code::Bfloat, 16, 4)) && cache.shape(1) > 0,
          whole() + ", expected float32, float16 or bfloat16 [N, P, H, K], or int8 [N, P, H, K + 4]");
    BLUEJAY_CHECK(cache.shape(2) == x.shape(1) && cache.shape(3) == x.shape(2) + (int8 ? sizeof(float) : 0),
          whole() + ", expected heads and head dim" + (int8 ? " + 4" : "") + " as in " + x_name + ", " + described(x));
    check_memory(cache, name, false);
    bool apart = is_dense(cache, 2);
    for (size_t dim = 0; dim < 2; ++dim) apart = apart && (cache.shape(dim) == 1 || cache.stride(dim) != 0);
    BLUEJAY_CHECK(apart, std::string(name) + " has strides " +
                     listed(std::vector<int64_t>(cache.stride_ptr(), cache.stride_ptr() + 4)) +
                     ", expected each token's heads and dims to be contiguous");
}

void check_caches(const Array& keys, const Array& values, const Array& x, const char* x_name) {
    check_cache(keys, "k_cache", x, x_name);
    check_cache(values, "v_cache", x, x_name);
    BLUEJAY_CHECK(keys.dtype() == values.dtype() && same_shape(keys, values),
          "v_cache is " + described(values) + ", expected k_cache's " + described(keys));
}

KvType type_of(const Array& cache) {
    if (cache.dtype().bits == 8) return KvType::int8;
    if (cache.dtype().bits == 32) return KvType::float32;
    return cache.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) ? KvType::float16 : KvType::bfloat16;
}

CacheView view_of(const Array& cache) {
    const int64_t bytes = cache.dtype().bits / 8;
    return {const_cast<char*>(static_cast<const char*>(cache.data())), cache.stride(0) * bytes, cache.stride(1) * bytes};
}

template <typename Number>
const Number* numbers(const Array& array) {
    return static_cast<const Number*>(array.data());
}

// At most ten, for a message.
template <typename Number>
std::string first_ten(const Number* all, size_t count) {
    return listed(std::vector<Number>(all, all + std::min<size_t>(count, 10)));
}

// What can be told of a batch by its arrays, without looking into them.
void check_batch(const Array& tables, const Array& lens, const Array& starts) {
    BLUEJAY_CHECK(is_int(tables, 32, 2), "block_tables is " + described(tables) + ", expected int32 [S, max_blocks]");
    const size_t S = tables.shape(0);
    const auto check_ints = [&](const Array& array, const char* name, size_t size) {
        BLUEJAY_CHECK(is_int(array, 32, 1) && array.shape(0) == size,
                      std::string(name) + " is " + described(array) + ", expected int32 [" + std::to_string(size) +
                          "] for the " + std::to_string(S) + " sequences of block_tables");
        check_memory(array, name, true);
    };
    check_memory(tables, "block_tables", true);
    check_ints(lens, "context_lens", S);
    check_ints(starts, "query_starts", S + 1);
}

// What the numbers of a batch say, with q of so many rows and a cache of so many blocks.
void check_numbers(const AttentionArgs& args, int64_t rows, int64_t num_blocks) {
    const int64_t S = args.sequences;
    const int32_t* start = args.query_starts;
    BLUEJAY_CHECK(start[0] == 0 && start[S] == rows && std::is_sorted(start, start + S + 1),
                  "query_starts is " + first_ten(start, S + 1) + ", expected to rise from 0 to the " +
                      std::to_string(rows) + " rows of q");
    for (int64_t s = 0; s < S; ++s) {
        const int64_t length = args.context_lens[s], count = start[s + 1] - start[s];
        BLUEJAY_CHECK(count <= length && length <= args.max_blocks * args.block_size,
                      "context_lens of sequence " + std::to_string(s) + " is " + std::to_string(length) +
                          ", expected at least its queries, " + std::to_string(count) + ", and at most the " +
                          std::to_string(args.max_blocks * args.block_size) + " slots of a block table");
        const int32_t* table = args.block_tables + s * args.max_blocks;
        for (int64_t b = 0; b * args.block_size < length; ++b)
            BLUEJAY_CHECK(0 <= table[b] && table[b] < num_blocks,
                          "block_tables of sequence " + std::to_string(s) + " names block " + std::to_string(table[b]) +
                              " at place " + std::to_string(b) + ", which is not there, expected 0 to " +
                              std::to_string(num_blocks - 1) + " for as long as the context goes on");
    }
}

void attention(nb::ndarray<> out, Array q, Array k_cache, Array v_cache, Array block_tables, Array context_lens,
               Array query_starts, double scale, std::optional<int64_t> window) {
    check_tokens(q, "q");
    check_tokens(Array(out), "out");
    BLUEJAY_CHECK(same_shape(Array(out), q), "out is " + described(Array(out)) + ", expected q's " + described(q));
    check_caches(k_cache, v_cache, q, "q");
    BLUEJAY_CHECK(std::isfinite(static_cast<float>(scale)), "scale is " + std::to_string(scale) + ", expected a finite number");
    BLUEJAY_CHECK(!window || *window > 0,
          "window is " + (window ? std::to_string(*window) : "None") + ", expected None or at least 1");
    check_batch(block_tables, context_lens, query_starts);
    const AttentionArgs args{numbers<float>(q),
                             static_cast<float*>(out.data()),
                             static_cast<int64_t>(q.shape(1)),
                             static_cast<int64_t>(q.shape(2)),
                             type_of(k_cache),
                             view_of(k_cache),
                             view_of(v_cache),
                             static_cast<int64_t>(k_cache.shape(1)),
                             numbers<int32_t>(block_tables),
                             static_cast<int64_t>(block_tables.shape(1)),
                             numbers<int32_t>(context_lens),
                             numbers<int32_t>(query_starts),
                             static_cast<int64_t>(block_tables.shape(0)),
                             static_cast<float>(scale),
                             std::min<int64_t>(window.value_or(0), INT32_MAX)};
    submit([args, rows = static_cast<int64_t>(q.shape(0)), num_blocks = static_cast<int64_t>(k_cache.shape(0))] {
        check_numbers(args, rows, num_blocks);
        paged_attention(args);
    });
}

void check_slots(const WriteArgs& args, int64_t num_slots) {
    std::vector<int64_t> used;
    for (int64_t i = 0; i < args.tokens; ++i) {
        const int64_t slot = args.slots[i];
        BLUEJAY_CHECK(-1 <= slot && slot < num_slots,
                      "slots holds " + std::to_string(slot) + ", expected -1 or 0 to " + std::to_string(num_slots - 1) +
                          ": the cache has " + std::to_string(num_slots) + " slots");
        if (slot >= 0) used.push_back(slot);
    }
    std::sort(used.begin(), used.end());
    const auto twice = std::adjacent_find(used.begin(), used.end());
    BLUEJAY_CHECK(twice == used.end(),
                  "slots holds " + std::to_string(*twice) + " more than once, expected a slot of its own for each token");
}

void write(Array k, Array v, nb::ndarray<> k_cache, nb::ndarray<> v_cache, Array slots) {
    const Array keys(k_cache), values(v_cache);
    check_tokens(k, "k");
    BLUEJAY_CHECK(is_float32(v, 3) && same_shape(v, k), "v is " + described(v) + ", expected k's " + described(k));
    check_memory(v, "v", true);
    check_caches(keys, values, k, "k");
    BLUEJAY_CHECK(is_int(slots, 64, 1) && slots.shape(0) == k.shape(0),
                  "slots is " + described(slots) + ", expected int64 [" + std::to_string(k.shape(0)) +
                      "]: one for each token of k");
    check_memory(slots, "slots", true);
    const WriteArgs args{numbers<float>(k),
                         numbers<float>(v),
                         static_cast<int64_t>(k.shape(0)),
                         static_cast<int64_t>(k.shape(1)),
                         static_cast<int64_t>(k.shape(2)),
                         type_of(keys),
                         view_of(keys),
                         view_of(values),
                         static_cast<int64_t>(keys.shape(1)),
                         numbers<int64_t>(slots)};
    submit([args, num_slots = static_cast<int64_t>(keys.shape(0) * keys.shape(1))] {
        check_slots(args, num_slots);
        write_kv(args);
    });
}

}  // namespace

void bind_attention(nb::module_& m) {
    using namespace nb::literals;
    m.def("paged_attention", &attention, "out"_a, "q"_a, "k_cache"_a, "v_cache"_a, "block_tables"_a, "context_lens"_a,
          "query_starts"_a, "scale"_a, "window"_a.none());
    m.def("write_kv", &write, "k"_a, "v"_a, "k_cache"_a, "v_cache"_a, "slots"_a);
}

}  // namespace bluejay
