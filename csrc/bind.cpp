// The Python module bluejay.ops._native. Each bind_*.cpp checks what comes from Python for its kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "pool.h"

namespace nb = nanobind;

namespace bluejay {

void bind_linear(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_elementwise(nb::module_& m);
void bind_bandwidth(nb::module_& m);
void bind_record(nb::module_& m);

namespace {

// What this processor has, best first.
std::vector<std::string> supported() {
    std::vector<std::string> names;
    for (int isa = static_cast<int>(detected()); isa >= 0; --isa) names.emplace_back(name(static_cast<Isa>(isa)));
    return names;
}

void choose(const std::string& wanted) {
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512_vnni}) {
        if (wanted == name(isa)) return set_active(isa);
    }
    throw std::invalid_argument("unknown instruction set " + wanted);
}

}  // namespace
}  // namespace bluejay

NB_MODULE(_native, m) {
    using namespace bluejay;
    using namespace nb::literals;
    m.def("supported", &supported);
    m.def("active", [] { return std::string(name(active())); });
    m.def("set_active", &choose, "name"_a);
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, "count"_a, "spin"_a = true, nb::call_guard<nb::gil_scoped_release>());
    bind_linear(m);
    bind_attention(m);
    bind_elementwise(m);
    bind_bandwidth(m);
    bind_record(m);
}
