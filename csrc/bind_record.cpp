// Recordings for Python. What a recording's calls point to must be kept alive there.
#include "record.h"

namespace nb = nanobind;

namespace bluejay {

void bind_record(nb::module_& m) {
    nb::class_<Recording>(m, "Recording")
        .def(nb::init<>())
        .def("start", [](Recording& self) { open_recording() = &self; })
        .def("stop", [](Recording&) { open_recording() = nullptr; })
        .def("replay",
             [](const Recording& self) {
                 const nb::gil_scoped_release released;
                 for (const auto& call : self) call();
             })
        .def("__len__", [](const Recording& self) { return self.size(); });
}

}  // namespace bluejay
