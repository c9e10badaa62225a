// What the bindings refuse becomes a ValueError in Python.
#pragma once

#include <stdexcept>

// A macro, so that a message is put together only where it is needed: each call of a kernel passes a dozen of them.
#define BLUEJAY_CHECK(holds, ...)                              \
    do {                                                       \
        if (!(holds)) throw std::invalid_argument(__VA_ARGS__); \
    } while (false)
