// SPDX-License-Identifier: Apache-2.0
//
// Runs convolution, upsampling and loss once through their C++ headers, without torch, against the
// formula written down naively in double. Always on the CPU; on the GPU too where the build and the
// machine have one. Prints one line per check; the exit code is the number of failures.
#include "dilseg/cross_entropy.h"
#include "dilseg/dilated_conv2d.h"
#include "dilseg/upsample_add.h"

#ifdef DILSEG_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

using dilseg::Strides4;

int failures = 0;

Strides4 contiguous(int64_t c, int64_t h, int64_t w) { return {c * h * w, h * w, w, 1}; }

// Reproducible values in [-1, 1).
std::vector<float> values(int64_t count, uint32_t seed) {
  std::vector<float> result(count);
  for (float& value : result) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 23) - 1.0f;
  }
  return result;
}

void report(const std::string& what, double error, double bound) {
  const bool good = error <= bound;  // false for nan
  std::printf("%-34s max error %.2e (bound %.0e)  %s\n",
              what.c_str(),
              error,
              bound,
              good ? "ok" : "FAILED");
  failures += good ? 0 : 1;
}

// The largest absolute difference; nan as soon as one is.
double max_error(const std::vector<float>& result, const std::vector<double>& expected) {
  double error = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    const double difference = std::abs(result[i] - expected[i]);
    if (std::isnan(difference)) {
      return difference;
    }
    error = std::max(error, difference);
  }
  return error;
}

// --- the problems and their naive answers --------------------------------------------------------

// x2 bilinear upsampling plus a skip that is larger than the output and cropped at (1, 2).
struct UpsampleCase {
  static constexpr int64_t n = 2, c = 3, h_in = 5, w_in = 7, h_out = 10, w_out = 14;
  static constexpr int64_t h_skip = 13, w_skip = 17, offset_h = 1, offset_w = 2;

  std::vector<float> input = values(n * c * h_in * w_in, 1);
  std::vector<float> skip = values(n * c * h_skip * w_skip, 2);

  dilseg::UpsampleAddParams params(const float* in, const float* add, float* out) const {
    dilseg::UpsampleAddParams p = {};
    p.dtype = dilseg::Dtype::kFloat32;
    p.geometry = {};
    p.geometry.n = n;
    p.geometry.c = c;
    p.geometry.h_in = h_in;
    p.geometry.w_in = w_in;
    p.geometry.h_out = h_out;
    p.geometry.w_out = w_out;
    p.geometry.border = dilseg::Border::kClamp;
    p.input = in;
    p.input_strides = contiguous(c, h_in, w_in);
    p.skip = add;
    p.skip_strides = contiguous(c, h_skip, w_skip);
    p.offset_h = offset_h;
    p.offset_w = offset_w;
    p.output = out;
    p.output_strides = contiguous(c, h_out, w_out);
    return p;
  }

  std::vector<double> expected() const {
    std::vector<double> result;
    for (int64_t plane = 0; plane < n * c; ++plane) {
      const float* in = input.data() + plane * h_in * w_in;
      const float* add = skip.data() + plane * h_skip * w_skip;
      for (int64_t y = 0; y < h_out; ++y) {
        const double sy = std::clamp((y + 0.5) / 2 - 0.5, 0.0, h_in - 1.0);
        const int64_t y0 = static_cast<int64_t>(sy), y1 = std::min(y0 + 1, h_in - 1);
        for (int64_t x = 0; x < w_out; ++x) {
          const double sx = std::clamp((x + 0.5) / 2 - 0.5, 0.0, w_in - 1.0);
          const int64_t x0 = static_cast<int64_t>(sx), x1 = std::min(x0 + 1, w_in - 1);
          const double ty = sy - y0, tx = sx - x0;
          const double top = (1 - tx) * in[y0 * w_in + x0] + tx * in[y0 * w_in + x1];
          const double bottom = (1 - tx) * in[y1 * w_in + x0] + tx * in[y1 * w_in + x1];
          result.push_back((1 - ty) * top + ty * bottom +
                           add[(y + offset_h) * w_skip + x + offset_w]);
        }
      }
    }
    return result;
  }
};

// Mean softmax cross-entropy over pixels of which one is ignored.
struct LossCase {
  static constexpr int64_t n = 2, c = 5, h = 9, w = 11, pixels = n * h * w;

  std::vector<float> logits = values(pixels * c, 3);
  std::vector<uint8_t> target;

  LossCase() : target(pixels) {
    for (int64_t i = 0; i < pixels; ++i) {
      target[i] = static_cast<uint8_t>(i * 7 % c);
    }
    target[4] = 255;
  }

  dilseg::CrossEntropyParams params(const float* input,
                                    const uint8_t* labels,
                                    float* loss,
                                    float* logsumexp,
                                    float* total_weight,
                                    double* partials) const {
    dilseg::CrossEntropyParams p = {};
    p.problem.dtype = dilseg::Dtype::kFloat32;
    p.problem.target_type = dilseg::IndexType::kUInt8;
    p.problem.reduction = dilseg::Reduction::kMean;
    p.problem.n = n;
    p.problem.c = c;
    p.problem.h = h;
    p.problem.w = w;
    p.problem.ignore_index = 255;
    p.problem.input = input;
    p.problem.input_strides = contiguous(c, h, w);
    p.problem.target = labels;
    p.loss = loss;
    p.logsumexp = logsumexp;
    p.total_weight = total_weight;
    p.partials = partials;
    return p;
  }

  double expected() const {
    double sum = 0;
    int64_t labelled = 0;
    for (int64_t i = 0; i < pixels; ++i) {
      if (target[i] == 255) {
        continue;
      }
      const float* pixel = logits.data() + i / (h * w) * c * h * w + i % (h * w);
      double exponentials = 0;
      for (int64_t k = 0; k < c; ++k) {
        exponentials += std::exp(static_cast<double>(pixel[k * h * w]));
      }
      sum += std::log(exponentials) - pixel[target[i] * h * w];
      ++labelled;
    }
    return sum / labelled;
  }
};

void check_cpu() {
  const UpsampleCase up;
  const std::vector<double> expected = up.expected();
  std::vector<float> output(expected.size());
  dilseg::cpu::upsample_add(up.params(up.input.data(), up.skip.data(), output.data()),
                            dilseg::serial());
  report("cpu upsample_add", max_error(output, expected), 1e-6);

  const LossCase loss;
  std::vector<float> logsumexp(LossCase::pixels);
  std::vector<float> mean(1), total(1);
  const dilseg::LabelError error = dilseg::cpu::cross_entropy(loss.params(loss.logits.data(),
                                                                          loss.target.data(),
                                                                          mean.data(),
                                                                          logsumexp.data(),
                                                                          total.data(),
                                                                          nullptr),
                                                              dilseg::serial());
  report("cpu cross_entropy", max_error(mean, {loss.expected()}), 1e-6);
  report("cpu cross_entropy, counted pixels", max_error(total, {LossCase::pixels - 1.0}), 0);
  report("cpu cross_entropy, labels", error.pixel == -1 ? 0 : 1, 0);
}

#ifdef DILSEG_WITH_CUDA

// 3x3, dilation 2, stride 1, padding 2, two groups, with bias.
struct ConvCase {
  static constexpr int64_t n = 2, c_in = 4, c_out = 6, h = 9, w = 11, k = 3, dil = 2, groups = 2;

  std::vector<float> input = values(n * c_in * h * w, 4);
  std::vector<float> weight = values(c_out * (c_in / groups) * k * k, 5);
  std::vector<float> bias = values(c_out, 6);

  dilseg::DilatedConv2dParams params(const float* in,
                                     const float* wgt,
                                     const float* b,
                                     float* out) const {
    dilseg::DilatedConv2dParams p = {};
    p.shape = {n, c_in, h, w, c_out, h, w, k, k, 1, 1, dil, dil, dil, dil, groups};
    p.dtype = dilseg::Dtype::kFloat32;
    p.input = in;
    p.weight = wgt;
    p.bias = b;
    p.output = out;
    p.input_strides = contiguous(c_in, h, w);
    p.weight_strides = contiguous(c_in / groups, k, k);
    p.output_strides = contiguous(c_out, h, w);
    return p;
  }

  std::vector<double> expected() const {
    const int64_t c_group = c_in / groups;
    std::vector<double> result;
    for (int64_t image = 0; image < n; ++image) {
      for (int64_t o = 0; o < c_out; ++o) {
        for (int64_t y = 0; y < h; ++y) {
          for (int64_t x = 0; x < w; ++x) {
            double sum = bias[o];
            for (int64_t c = 0; c < c_group; ++c) {
              const int64_t plane = image * c_in + o / (c_out / groups) * c_group + c;
              for (int64_t i = 0; i < k; ++i) {
                for (int64_t j = 0; j < k; ++j) {
                  const int64_t row = y + (i - 1) * dil, column = x + (j - 1) * dil;
                  if (row >= 0 && row < h && column >= 0 && column < w) {
                    sum += static_cast<double>(weight[((o * c_group + c) * k + i) * k + j]) *
                           input[(plane * h + row) * w + column];
                  }
                }
              }
            }
            result.push_back(sum);
          }
        }
      }
    }
    return result;
  }
};

void require(dilseg::cuda::Status status) {
  if (status != 0) {
    std::printf("%s\n", dilseg::cuda::status_message(status));
    std::exit(1);
  }
}

// An array in GPU memory.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    require(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }

  std::vector<T> host() const {
    std::vector<T> result(size_);
    require(cudaMemcpy(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

void check_cuda() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("cuda: compiled in, but this machine has no usable GPU; not run\n");
    return;
  }
  const ConvCase conv;
  const std::vector<double> product = conv.expected();
  {
    const DeviceArray<float> input(conv.input), weight(conv.weight), bias(conv.bias);
    const DeviceArray<float> output(product.size());
    require(dilseg::cuda::launch_dilated_conv2d(
        conv.params(input.data(), weight.data(), bias.data(), output.data()), nullptr));
    report("cuda dilated_conv2d", max_error(output.host(), product), 1e-5);
  }
  const UpsampleCase up;
  const std::vector<double> sum = up.expected();
  {
    const DeviceArray<float> input(up.input), skip(up.skip), output(sum.size());
    require(dilseg::cuda::launch_upsample_add(up.params(input.data(), skip.data(), output.data()),
                                              nullptr));
    report("cuda upsample_add", max_error(output.host(), sum), 1e-6);
  }
  const LossCase loss;
  {
    const DeviceArray<float> logits(loss.logits);
    const DeviceArray<uint8_t> target(loss.target);
    const DeviceArray<float> mean(1), logsumexp(LossCase::pixels), total(1);
    const DeviceArray<double> partials(2 * dilseg::cross_entropy_partials(LossCase::pixels));
    require(dilseg::cuda::launch_cross_entropy(loss.params(logits.data(),
                                                           target.data(),
                                                           mean.data(),
                                                           logsumexp.data(),
                                                           total.data(),
                                                           partials.data()),
                                               nullptr));
    report("cuda cross_entropy", max_error(mean.host(), {loss.expected()}), 1e-6);
  }
}

#endif

}  // namespace

int main() {
  check_cpu();
#ifdef DILSEG_WITH_CUDA
  check_cuda();
#else
  std::printf("cuda: not compiled in\n");
#endif
  return failures;
}
