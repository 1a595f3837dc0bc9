// SPDX-License-Identifier: MIT
#include "bootstrap/proof.h"

#include <dlfcn.h>
#include <unistd.h>

#include "deep_ep/error.h"

namespace deep_ep::bootstrap {

namespace {

// As OpenSSL declares them since 1.1; its headers are not needed for two functions.
using Sha256 = const void* (*)();
using Hmac = unsigned char* (*)(const void* digest, const void* key, int key_bytes, const unsigned char* data,
                                std::size_t bytes, unsigned char* out, unsigned int* out_bytes);

struct Crypto {
  Sha256 sha256 = nullptr;
  Hmac hmac = nullptr;
  std::string why_not;
};

Crypto open_crypto() {
  Crypto crypto;
  void* library = nullptr;
  for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"})
    if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    crypto.why_not = dlerror();
    return crypto;
  }
  crypto.sha256 = reinterpret_cast<Sha256>(dlsym(library, "EVP_sha256"));
  crypto.hmac = reinterpret_cast<Hmac>(dlsym(library, "HMAC"));
  if (crypto.sha256 == nullptr || crypto.hmac == nullptr) crypto.why_not = "libcrypto has no HMAC";
  return crypto;
}

}  // namespace

Nonce random_nonce() {
  Nonce nonce;
  if (getentropy(nonce.data(), nonce.size()) != 0) throw Error(ErrorCode::kSystem, "getentropy: no random numbers");
  return nonce;
}

Proof hmac_sha256(const std::string& key, std::span<const std::byte> message) {
  static const Crypto crypto = open_crypto();
  if (!crypto.why_not.empty())
    throw Error(ErrorCode::kUnsupported, "secret: it needs OpenSSL's libcrypto: " + crypto.why_not);
  Proof proof{};
  unsigned int bytes = 0;
  const auto* data = reinterpret_cast<const unsigned char*>(message.data());
  if (crypto.hmac(crypto.sha256(), key.data(), static_cast<int>(key.size()), data, message.size(),
                  reinterpret_cast<unsigned char*>(proof.data()), &bytes) == nullptr ||
      bytes != proof.size()) {
    throw Error(ErrorCode::kSystem, "libcrypto: HMAC failed");
  }
  return proof;
}

Proof prove(ProofOf side, const std::string& secret, std::span<const std::byte> greeting, const Nonce& challenge) {
  std::vector<std::byte> message{static_cast<std::byte>(side)};
  message.insert(message.end(), challenge.begin(), challenge.end());
  message.insert(message.end(), greeting.begin(), greeting.end());
  return hmac_sha256(secret, message);
}

bool is_same(const Proof& expected, std::span<const std::byte> claimed) {
  if (claimed.size() != expected.size()) return false;
  std::byte difference{0};
  for (std::size_t i = 0; i < expected.size(); ++i) difference |= expected[i] ^ claimed[i];
  return difference == std::byte{0};
}

}  // namespace deep_ep::bootstrap
