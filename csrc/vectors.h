// The compiler's vector types, BLUEJAY_VECTOR_BYTES long, and what the standard library has not for them.
//
// Each instruction set's file sets the size, includes the kernels and is compiled with its own flags. Everything is in an
// unnamed namespace and nothing comes from the standard library: what two files share, the linker keeps once, from either
// of them, and code for AVX-512 must not end up where an older processor runs it.
#pragma once

#include <cstdint>
#include <cstring>

#if BLUEJAY_VECTOR_BYTES > 16
#include <immintrin.h>
#endif

namespace bluejay {
namespace {

constexpr int kLanes = BLUEJAY_VECTOR_BYTES / 4;

typedef float Vec __attribute__((vector_size(BLUEJAY_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(BLUEJAY_VECTOR_BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BLUEJAY_VECTOR_BYTES)));

#define BLUEJAY_INLINE inline __attribute__((always_inline))

template <typename To, typename From>
BLUEJAY_INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits under another type");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T = Vec>
BLUEJAY_INLINE T load(const void* from) {
    T v;
    memcpy(&v, from, sizeof(v));
    return v;
}

BLUEJAY_INLINE void store(void* to, Vec v) { memcpy(to, &v, sizeof(v)); }

// Minus zero, which changes no number: plus zero would change -0, so that compilers really add.
BLUEJAY_INLINE Vec splat(float x) { return x - Vec{}; }

// a * b + c, rounded once where the processor can.
BLUEJAY_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if BLUEJAY_VECTOR_BYTES == 64
    return _mm512_fmadd_ps(a, b, c);
#elif BLUEJAY_VECTOR_BYTES == 32
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

BLUEJAY_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 0, to 2 units in the last place; 0 below -87.3, where float32 has no normal numbers left. NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial for e^r is Cephes' expf.
BLUEJAY_INLINE Vec exp_negative(Vec x) {
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const Vec shifted = multiply_add(x, splat(1.44269504f), magic);
    const Vec n = shifted - magic;
    const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
    Vec p = splat(1.9875691500e-4f);
    p = multiply_add(p, r, splat(1.3981999507e-3f));
    p = multiply_add(p, r, splat(8.3334519073e-3f));
    p = multiply_add(p, r, splat(4.1665795894e-2f));
    p = multiply_add(p, r, splat(1.6666665459e-1f));
    p = multiply_add(p, r, splat(5.0000001201e-1f));
    p = multiply_add(p, r * r, r) + 1.0f;
    const Bits exponent = as<Bits>(shifted) - as<Bits>(magic);  // far below -87.3 it wraps around, and is not used
    const Vec power = as<Vec>((exponent + 127) << 23);
    return x < -87.3f ? Vec{} : p * power;
}

}  // namespace
}  // namespace bluejay
