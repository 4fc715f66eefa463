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
  // What the kernels before have left here; `name` goes into the message where one of them failed.
  std::vector<T> values(const std::string& name) const {
    std::vector<T> v(size_);
#ifdef __CUDACC__
    vico::check_cuda(cudaMemcpy(v.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost), name.c_str());
#else
    static_cast<void>(name);
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

// A safetensors file of named arrays, in order.
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
    const auto* p = reinterpret_cast<const unsigned char*>(values.data());
    entries_.push_back({"\"" + name + "\":{\"dtype\":\"" + type_name(T{}) + "\",\"shape\":[" + dims + "]",
                        std::vector<unsigned char>(p, p + values.size() * sizeof(T))});
  }
  template <class T>
  Array<T> input(const std::string& name, const std::vector<T>& values, const std::vector<size_t>& shape) {
    add(name, values, shape);
    return Array<T>(values);
  }
  template <class T>
  void output(const std::string& name, const Array<T>& array, const std::vector<size_t>& shape) {
    add(name, array.values(name), shape);
  }

  // `device` goes into the metadata.
  void write(const char* path, const std::string& device) const {
    std::string header = "{\"__metadata__\":{\"device\":\"" + device + "\"}";
    uint64_t begin = 0;
    for (const Entry& e : entries_) {
      const uint64_t end = begin + e.bytes.size();
      header += "," + e.header + ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
      begin = end;
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::FILE* file = std::fopen(path, "wb");
    if (!file) throw std::runtime_error(std::string("cannot write ") + path);
    put(file, header);
    for (const Entry& e : entries_) put(file, e.bytes, false);
    if (std::fclose(file) != 0) throw std::runtime_error(std::string("cannot write ") + path);
  }

  // From one process to another, through an open file.
  void send(std::FILE* file) const {
    for (const Entry& e : entries_) {
      put(file, e.header);
      put(file, e.bytes);
    }
    if (std::fflush(file) != 0) throw std::runtime_error("cannot write a temporary file");
  }
  void receive(std::FILE* file) {
    Entry e;
    while (get(file, e.header) && get(file, e.bytes)) entries_.push_back(e);
  }

 private:
  struct Entry {
    std::string header;  // of the file: name, type and shape
    std::vector<unsigned char> bytes;
  };

  template <class Bytes>
  static void put(std::FILE* file, const Bytes& bytes, bool with_length = true) {
    const uint64_t length = bytes.size();
    if ((with_length && std::fwrite(&length, 8, 1, file) != 1) ||
        std::fwrite(bytes.data(), 1, length, file) != length) {
      throw std::runtime_error("cannot write the results");
    }
  }
  template <class Bytes>
  static bool get(std::FILE* file, Bytes& bytes) {
    uint64_t length;
    if (std::fread(&length, 8, 1, file) != 1) return false;
    bytes.resize(length);
    return std::fread(&bytes[0], 1, length, file) == length;
  }

  static const char* type_name(uint8_t) { return "U8"; }
  static const char* type_name(int8_t) { return "I8"; }
  static const char* type_name(uint16_t) { return "U16"; }
  static const char* type_name(int32_t) { return "I32"; }
  static const char* type_name(uint32_t) { return "U32"; }
  static const char* type_name(float) { return "F32"; }
  static const char* type_name(double) { return "F64"; }

  std::vector<Entry> entries_;
};

}  // namespace conformance
