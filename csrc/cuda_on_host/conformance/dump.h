// What conformance programs need on either side: arrays the kernels work on, and the file their results go to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/device.cuh"
#include "common/dtype.h"

#ifndef __CUDACC__
#include "cuda_on_host/runtime.h"
#endif

namespace conformance {

// Device memory with the contents of a vector.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
#ifdef __CUDACC__
    vico::check_cuda(cudaMalloc(&memory_, size_ * sizeof(T)), "cudaMalloc");
    vico::check_cuda(cudaMemcpy(memory_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
#else
    if (posix_memalign(reinterpret_cast<void**>(&memory_), 256, size_ * sizeof(T))) throw std::bad_alloc();
    std::memcpy(memory_, values.data(), size_ * sizeof(T));
    coh::track_global(memory_, size_ * sizeof(T));
#endif
  }
  ~Array() {
#ifdef __CUDACC__
    cudaFree(memory_);
#else
    coh::untrack_global(memory_);
    std::free(memory_);
#endif
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return memory_; }
  std::vector<T> values() const {
    std::vector<T> v(size_);
#ifdef __CUDACC__
    vico::check_cuda(cudaMemcpy(v.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "a conformance kernel");
#else
    std::memcpy(v.data(), memory_, size_ * sizeof(T));
#endif
    return v;
  }

 private:
  size_t size_;
  T* memory_ = nullptr;
};

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) { next(); }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 24);
  }
  int below(int n) { return static_cast<int>(next() >> 4) % n; }
  template <class T>
  std::vector<T> bits(size_t n) {
    std::vector<T> v(n);
    for (T& x : v) x = static_cast<T>(next());
    return v;
  }
  std::vector<float> floats(size_t n) {  // any bits
    std::vector<float> v(n);
    for (float& x : v) x = vico::detail::bit_cast<float>(next());
    return v;
  }
  // 16-bit floating point numbers: whole, -limit to limit, or, for limit 0, from -1 to 1 in steps of 2^-7.
  std::vector<uint16_t> numbers(size_t n, bool half, int limit) {
    std::vector<uint16_t> v(n);
    for (uint16_t& x : v) {
      float f = static_cast<float>(limit ? below(2 * limit + 1) - limit : below(257) - 128);
      if (!limit) f *= static_cast<float>(1 << below(8)) / (128 * 128);
      x = half ? vico::to_half(f).bits : vico::to_bfloat16(f).bits;
    }
    return v;
  }

 private:
  uint64_t state_;
};

// A safetensors file of named arrays.
class Dump {
 public:
  template <class T>
  void add(const std::string& name, const std::vector<T>& values, const std::vector<size_t>& shape) {
    size_t elements = 1;
    std::string dims;
    for (size_t n : shape) {
      elements *= n;
      dims += (dims.empty() ? "" : ",") + std::to_string(n);
    }
    if (elements != values.size()) throw std::runtime_error(name + " has another shape");
    const size_t begin = bytes_.size(), end = begin + values.size() * sizeof(T);
    header_ += (header_.empty() ? "" : ",") + ("\"" + name) + "\":{\"dtype\":\"" + type_name(T{}) + "\",\"shape\":[" +
               dims + "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    const auto* p = reinterpret_cast<const unsigned char*>(values.data());
    bytes_.insert(bytes_.end(), p, p + values.size() * sizeof(T));
  }
  template <class T>
  Array<T> input(const std::string& name, const std::vector<T>& values, const std::vector<size_t>& shape) {
    add(name, values, shape);
    return Array<T>(values);
  }
  template <class T>
  void output(const std::string& name, const Array<T>& array, const std::vector<size_t>& shape) {
    add(name, array.values(), shape);
  }

  // `device` goes into the metadata.
  void write(const char* path, const std::string& device) const {
    std::string header = "{\"__metadata__\":{\"device\":\"" + device + "\"}," + header_ + "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t length = header.size();
    std::FILE* file = std::fopen(path, "wb");
    if (!file) throw std::runtime_error(std::string("cannot write ") + path);
    const bool ok = std::fwrite(&length, 8, 1, file) == 1 && std::fwrite(header.data(), length, 1, file) == 1 &&
                    std::fwrite(bytes_.data(), bytes_.size(), 1, file) == 1;
    if (std::fclose(file) != 0 || !ok) throw std::runtime_error(std::string("cannot write ") + path);
  }

 private:
  static const char* type_name(uint8_t) { return "U8"; }
  static const char* type_name(int8_t) { return "I8"; }
  static const char* type_name(uint16_t) { return "U16"; }
  static const char* type_name(int32_t) { return "I32"; }
  static const char* type_name(uint32_t) { return "U32"; }
  static const char* type_name(float) { return "F32"; }
  static const char* type_name(double) { return "F64"; }

  std::string header_;
  std::vector<unsigned char> bytes_;
};

}  // namespace conformance
