// SPDX-License-Identifier: Apache-2.0
//
// Autograd for our ops in the form that torch's code generator gives its own: a kernel for the
// Autograd key runs the op below autograd and, where a gradient may be asked for, hangs a node into
// the graph. So functorch's transforms, compiled autograd and hooks treat them as torch's.
//
// A rule says what a node keeps and computes:
//
//   struct Rule {
//     static constexpr const char* kName;       // of the node
//     static constexpr size_t kInputs;          // arguments that a gradient may be asked for
//     using Saved = std::array<at::Tensor, N>;  // undefined where no gradient needs them
//     using Options = std::tuple<...>;          // what is no tensor; sizes as SymInt
//     static variable_list gradients(const variable_list& grads, const Needs<kInputs>& needs,
//                                    const Saved& saved, const Options& options);
//   };
//
// `gradients` is a function of its arguments alone, made of ops that the dispatcher knows: it can
// be differentiated again, and traced. It computes what `needs` asks for; gradients that do not
// arrive, and those that nobody needs, are undefined.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

namespace dilseg::ops {

using torch::autograd::compute_requires_grad;
using torch::autograd::set_history;
using torch::autograd::variable_list;

template <size_t kInputs>
using Needs = std::array<bool, kInputs>;

// Options as nodes keep them.
using Ints = std::vector<int64_t>;
using SymInts = std::vector<c10::SymInt>;
using Scales = std::optional<std::vector<double>>;

inline Scales keep(std::optional<at::ArrayRef<double>> scale_factors) {
  return scale_factors.has_value() ? Scales(scale_factors->vec()) : std::nullopt;
}

// Height and width of [n, c, h, w].
inline SymInts plane(const at::Tensor& t) { return {t.sym_size(2), t.sym_size(3)}; }

template <class Rule>
class Backward final : public torch::autograd::Node {
 public:
  typename Rule::Options options;

  // Changing the tensor in place between now and the backward pass is an error then.
  void save(size_t index, const at::Tensor& tensor) { keep(index, tensor, false); }
  // The same for a result of the node's own call, after set_history.
  void save_result(size_t index, const at::Tensor& tensor) { keep(index, tensor, true); }

  std::string name() const override { return Rule::kName; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return Rule::gradients(grads, needs(), unpack(), options);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& variable : saved_) {
      variable.reset_data();
    }
  }

  // Compiled autograd: what the compiled graph depends on, ...
  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    for (const torch::autograd::SavedVariable& variable : saved_) {
      args.collect(variable, /*is_output=*/true);
    }
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options);
  }

  // ... and a call of `gradients` as one step of that graph, with placeholders for tensors and
  // sizes.
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::autograd::SwapSavedVariables& swap) override {
    using torch::dynamo::autograd::IValuePacker;
    each([&](auto& value) { swap.before(value); });
    torch::autograd::PackedArgs args;
    const Needs<Rule::kInputs> needed = needs();
    args.pack(std::vector<bool>(needed.begin(), needed.end()));
    for (const at::Tensor& tensor : unpack()) {
      args.pack(tensor);
    }
    std::apply([&](const auto&... option) { (args.pack(option), ...); }, options);
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    static const std::string bound =
        compiler->bind_function(swap.get_py_compiler(), name(), &gradients_of_packed, types());
    variable_list result = compiler->call_function(
        swap.get_py_compiler(),
        "apply_functional",
        bound,
        grads,
        args.vec(),
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            torch::dynamo::autograd::get_input_metadata(next_edges())));
    each([&](auto& value) { swap.after(value); });
    return result;
  }

 private:
  using Saved = typename Rule::Saved;
  using Options = typename Rule::Options;
  static constexpr size_t kSaved = std::tuple_size_v<Saved>;

  void keep(size_t index, const at::Tensor& tensor, bool is_output) {
    saved_[index] = torch::autograd::SavedVariable(tensor, is_output);
  }

  Needs<Rule::kInputs> needs() const {
    Needs<Rule::kInputs> needs{};
    for (size_t i = 0; i < needs.size(); ++i) {
      needs[i] = task_should_compute_output(i);
    }
    return needs;
  }

  Saved unpack() {
    Saved tensors;
    for (size_t i = 0; i < kSaved; ++i) {
      tensors[i] = saved_[i].unpack(getptr());
    }
    return tensors;
  }

  template <class Visit>
  void each(const Visit& visit) {
    for (torch::autograd::SavedVariable& variable : saved_) {
      visit(variable);
    }
    std::apply([&](auto&... option) { (visit(option), ...); }, options);
  }

  static std::vector<at::TypePtr> types() {
    using torch::dynamo::autograd::IValuePacker;
    std::vector<at::TypePtr> types = {IValuePacker<std::vector<bool>>::packed_type()};
    types.insert(types.end(), kSaved, at::TensorType::get());
    [&]<class... Option>(std::type_identity<std::tuple<Option...>>) {
      (types.push_back(IValuePacker<Option>::packed_type()), ...);
    }(std::type_identity<Options>());
    return types;
  }

  static variable_list gradients_of_packed(const variable_list& grads,
                                           const std::vector<c10::IValue>& packed) {
    torch::autograd::PackedArgs args(packed);
    const auto needed = args.unpack<std::vector<bool>>();
    Needs<Rule::kInputs> needs{};
    std::copy_n(needed.begin(), needs.size(), needs.begin());
    Saved saved;
    for (at::Tensor& tensor : saved) {
      tensor = args.unpack<at::Tensor>();
    }
    Options options;
    std::apply(
        [&](auto&... option) {
          ((option = args.template unpack<std::remove_reference_t<decltype(option)>>()), ...);
        },
        options);
    return Rule::gradients(grads, needs, saved, options);
  }

  std::array<torch::autograd::SavedVariable, kSaved> saved_;
};

// torch counts references to nodes itself since 2.13, with std::shared_ptr before.
template <class Node>
auto make_counted() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>();
  } else {
    return std::shared_ptr<Node>(new Node, [](Node* node) { deleteNode(node); });
  }
}

// The node of a call; `inputs` are the arguments that a gradient may be asked for.
template <class Rule, class... Inputs>
auto make_node(const Inputs&... inputs) {
  static_assert(sizeof...(Inputs) == Rule::kInputs);
  auto node = make_counted<Backward<Rule>>();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

// Runs the op for the keys below autograd.
template <class Op, class... Arguments>
auto below_autograd(const Op& op, c10::DispatchKeySet keys, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(keys & c10::after_autograd_keyset, arguments...);
}

// An optional argument that was kept, as the ops take it.
inline std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

// No rule computes forward-mode tangents; without this they would be dropped in silence.
template <class T>
void refuse_tangent(const char* op, const char* name, const T& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(tensor),
      "dilseg::",
      op,
      ": expected ",
      name,
      " without a forward-mode tangent, but got a dual tensor. Forward-mode differentiation is not "
      "implemented; use reverse mode, for instance torch.autograd.functional.jacobian.");
}

}  // namespace dilseg::ops
