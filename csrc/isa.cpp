#include "isa.h"

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#ifdef BLUEJAY_X86
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace bluejay {
namespace {

#ifdef BLUEJAY_X86
struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf) {
    Registers r;
#ifdef _MSC_VER
    int values[4];
    __cpuid(values, 0);
    if (static_cast<uint32_t>(values[0]) < leaf) return r;
    __cpuidex(values, static_cast<int>(leaf), 0);
    r = {uint32_t(values[0]), uint32_t(values[1]), uint32_t(values[2]), uint32_t(values[3])};
#else
    __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros for a leaf that is not there
#endif
    return r;
}

// Which registers the operating system saves when it switches threads: without that, the instructions are not usable.
uint64_t saved_registers() {
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
#endif
}

bool has(uint32_t value, std::initializer_list<int> bits) {
    for (int bit : bits) {
        if (!(value >> bit & 1)) return false;
    }
    return true;
}

Isa detect() {
    const Registers one = cpuid(1), seven = cpuid(7);
    if (!has(one.ecx, {12 /* FMA */, 27 /* OSXSAVE */, 28 /* AVX */, 29 /* F16C */})) return Isa::portable;
    const uint64_t saved = saved_registers();
    if ((saved & 0x06) != 0x06 || !has(seven.ebx, {5 /* AVX2 */})) return Isa::portable;
    const bool wide = (saved & 0xe6) == 0xe6 && has(seven.ebx, {16 /* F */, 17 /* DQ */, 30 /* BW */, 31 /* VL */}) &&
                      has(seven.ecx, {11 /* VNNI */});
    return wide ? Isa::avx512_vnni : Isa::avx2;
}
#else
Isa detect() { return Isa::portable; }
#endif

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{detected()};
    return isa;
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512_vnni: return "avx512_vnni";
        default: return "portable";
    }
}

Isa detected() {
    static const Isa isa = detect();
    return isa;
}

Isa active() { return chosen().load(std::memory_order_relaxed); }

void set_active(Isa isa) {
    if (isa > detected()) {
        throw std::invalid_argument(std::string("this processor has no ") + name(isa) + "; the best it has is " +
                                    name(detected()));
    }
    chosen().store(isa, std::memory_order_relaxed);
}

}  // namespace bluejay
