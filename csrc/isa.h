// The instruction sets that kernels are written for, and which of them is in use.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define BLUEJAY_X86 1  // the *_avx2.cpp and *_avx512.cpp are compiled
#endif

namespace bluejay {

enum class Isa {
    portable,     // C++ for any processor
    avx2,         // AVX2, FMA, F16C
    avx512_vnni,  // AVX-512 F, BW, VL, DQ and VNNI, and all of avx2
};

const char* name(Isa isa);

// The best that this processor and operating system offer.
Isa detected();

// The one in use: the best, unless set_active chose another.
Isa active();

// std::invalid_argument if this processor lacks it.
void set_active(Isa isa);

}  // namespace bluejay
