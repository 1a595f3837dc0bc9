// SPDX-License-Identifier: MIT
// The border between C++ and C: no exception crosses it, and structs of other versions are read and written by their
// size.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <type_traits>

#include "check.h"
#include "deep_ep.h"
#include "deep_ep/error.h"

namespace deep_ep::capi {

/// Makes the exception in flight the thread's last error. Only inside a catch block.
deep_ep_status record_exception() noexcept;

/// Runs `body`; what it throws becomes the status and the thread's last error.
template <typename Body>
deep_ep_status guarded(Body&& body) noexcept {
  try {
    body();
    return DEEP_EP_OK;
  } catch (...) {
    return record_exception();
  }
}

/// Runs `make` and hands its unique_ptr over through `out`, which is NULL after a failure.
template <typename Object, typename Make>
deep_ep_status make_object(Object** out, Make&& make) noexcept {
  return guarded([&] {
    require(out != nullptr, "result pointer: NULL");
    *out = nullptr;
    std::unique_ptr<Object> made = make();
    *out = made.release();
  });
}

/// The reference that a required pointer stands for.
template <typename T>
T& given(T* pointer, const char* name) {
  require(pointer != nullptr, "{}: NULL", name);
  return *pointer;
}

/// How many bytes a struct has, here and on the caller's side.
struct StructSize {
  const char* name;   // for messages
  std::size_t first;  // up to the last field that the call cannot do without: what any caller has
  std::size_t ours;
};

/// The caller's `size`. Throws kInvalidArgument for one that no version of the struct has.
std::size_t checked_size(const void* theirs, const StructSize& size);

/// Copies the caller's fields over `ours`. Throws as checked_size(), and kUnsupported where a field that this library
/// does not know is set.
void read_struct(void* ours, const void* theirs, const StructSize& size);

/// Copies `ours` to the caller, as much as it has room for; its `size` stays.
void write_struct(void* theirs, const void* ours, const StructSize& size);

template <typename T>
inline constexpr bool kStableLayout = std::is_standard_layout_v<T>&& std::is_trivially_copyable_v<T> &&
                                      // Padding would be garbage to a later version whose fields lie there.
                                      (std::has_unique_object_representations_v<T> || sizeof(void*) != 8);

/// A caller's struct with the fields that it did not know as zero, which is the default of all of them.
template <typename T>
T read(const T* theirs, const char* name, std::size_t first) {
  static_assert(kStableLayout<T>);
  T ours{};
  ours.size = sizeof(T);
  if (theirs != nullptr) read_struct(&ours, theirs, {name, first, sizeof(T)});
  return ours;
}

template <typename T>
void write(T* theirs, const T& ours, const char* name, std::size_t first) {
  static_assert(kStableLayout<T>);
  given(theirs, name);
  write_struct(theirs, &ours, {name, first, sizeof(T)});
}

/// The end of a field, for `first`.
#define EP_END_OF(type, field) (offsetof(type, field) + sizeof(type::field))

/// `value` if it is 0 .. last; enums come from C, where any int may stand in them.
template <typename Enum>
Enum checked_enum(Enum value, Enum last, const char* name) {
  const int number = static_cast<int>(value);
  require(number >= 0 && number <= static_cast<int>(last), "{}: {}, known are 0 .. {}", name, number,
          static_cast<int>(last));
  return value;
}

}  // namespace deep_ep::capi
