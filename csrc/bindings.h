// What the bindings share: addresses, checks, and how a kernel becomes a function of the module.
//
// Tensors come as addresses; 0 means None. Only kernels/<op>/_native.py calls these functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/isa.h"

namespace rlhf {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* required(Address address, const char* name) {
  RLHF_CHECK(address != 0, std::string(name) + ": expected an address, got 0");
  return pointer<T>(address);
}

inline void check_positive(int64_t value, const char* name) {
  RLHF_CHECK(value > 0,
             std::string(name) + ": expected a positive number, got " + std::to_string(value));
}

inline void check_dtype(int dtype, const char* name) {
  RLHF_CHECK(dtype >= 0 && dtype <= 2,
             std::string(name) + ": expected 0, 1 or 2, got " + std::to_string(dtype));
}

// Defines cpu_<name>(threads, what `make` takes...).
template <class Args, class... In>
void define_cpu(py::module_& m, const std::string& name, Args (*make)(int, In...),
                void (*kernel)(const Args&)) {
  m.def(("cpu_" + name).c_str(), [make, kernel](int threads, In... in) {
    const Args args = make(threads, in...);
    py::gil_scoped_release released;
    kernel(args);
  });
}

// Defines cuda_<name>(device, stream, what `make` takes...).
template <class Args, class... In>
void define_cuda(py::module_& m, const std::string& name, Args (*make)(int, In...),
                 void (*kernel)(const Args&, int, void*)) {
  m.def(("cuda_" + name).c_str(), [make, kernel](int device, Address stream, In... in) {
    const Args args = make(1, in...);
    py::gil_scoped_release released;
    kernel(args, device, pointer<void>(stream));
  });
}

#if RLHF_WITH_CUDA
#define RLHF_DEFINE_CUDA(name, make) define_cuda(m, #name, make, cuda::name)
#else
#define RLHF_DEFINE_CUDA(name, make) static_cast<void>(0)
#endif
#define RLHF_DEFINE_CPU(name, make) define_cpu(m, #name, make, cpu::name)
#define RLHF_DEFINE(name, make) RLHF_DEFINE_CPU(name, make), RLHF_DEFINE_CUDA(name, make)

// What a decode step calls: bindings_decoding.cpp.
void define_decoding(py::module_& m);

}  // namespace rlhf
