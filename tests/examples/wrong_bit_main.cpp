// SPDX-License-Identifier: MIT
// The demo (examples/moe_layer.cpp) with a library that errs by a single bit: its calls of Buffer::combine and
// Buffer::dispatch are linked to these, which ask the real ones and turn one bit of one rank's result over. To see that
// the demo notices. EP_TEST_WRONG says where: combine, or dispatch, which means an FP8 code.
#include <cstdlib>
#include <string_view>

#include "deep_ep/buffer.h"

namespace deep_ep {

// ld's --wrap: calls of X become calls of __wrap_X, and __real_X is X.
#define EP_COMBINE "_ZN7deep_ep6Buffer7combineERKNS_12CombineInputE"
#define EP_DISPATCH "_ZN7deep_ep6Buffer8dispatchERKNS_13DispatchInputE"
CombineOutput real_combine(Buffer* buffer, const CombineInput& input) asm("__real_" EP_COMBINE);
CombineOutput wrong_combine(Buffer* buffer, const CombineInput& input) asm("__wrap_" EP_COMBINE);
DispatchOutput real_dispatch(Buffer* buffer, const DispatchInput& input) asm("__real_" EP_DISPATCH);
DispatchOutput wrong_dispatch(Buffer* buffer, const DispatchInput& input) asm("__wrap_" EP_DISPATCH);

namespace {

bool is_wrong(const Buffer& buffer, std::string_view call) {
  const char* wanted = std::getenv("EP_TEST_WRONG");
  return wanted != nullptr && wanted == call && buffer.rank() == buffer.num_ranks() - 1;
}

}  // namespace

CombineOutput wrong_combine(Buffer* buffer, const CombineInput& input) {
  CombineOutput output = real_combine(buffer, input);
  if (is_wrong(*buffer, "combine") && output.x.numel() > 0)
    output.x.as<std::uint8_t>()[output.x.bytes() / 4 * 2] ^= 1;  // the last place of a number
  return output;
}

DispatchOutput wrong_dispatch(Buffer* buffer, const DispatchInput& input) {
  DispatchOutput output = real_dispatch(buffer, input);
  if (is_wrong(*buffer, "dispatch") && output.x.dtype == DType::kFp8E4m3 && output.x.numel() > 0)
    output.x.as<std::uint8_t>()[output.x.bytes() / 2] ^= 0x40;  // of the exponent
  return output;
}

}  // namespace deep_ep
