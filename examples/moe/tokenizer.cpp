// SPDX-License-Identifier: MIT
// Byte-pair encoding: cut into words, count neighbours, join the most frequent pair, repeat.
#include "tokenizer.h"

#include <fmt/format.h>

#include <cstdint>
#include <stdexcept>

namespace moe {
namespace {

bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r' || c == '\f'; }

/// Length of the first word: its leading white space, then everything up to the next white space.
std::size_t word_length(std::string_view text) {
  std::size_t end = 0;
  while (end < text.size() && is_space(text[end])) ++end;
  while (end < text.size() && !is_space(text[end])) ++end;
  return end;
}

std::uint64_t pair_key(int left, int right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
}

/// Replaces (left, right) by `joined`, from the left.
void join(std::vector<int>& ids, int left, int right, int joined) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const bool here = ids[i] == left && i + 1 < ids.size() && ids[i + 1] == right;
    ids[kept++] = here ? joined : ids[i];
    if (here) ++i;
  }
  ids.resize(kept);
}

}  // namespace

Tokenizer::Tokenizer(std::string_view text, int vocabulary) {
  for (int byte = 0; byte < 256; ++byte) bytes_of_.emplace_back(1, static_cast<char>(byte));
  while (!text.empty()) {
    const std::string word(text.substr(0, word_length(text)));
    const auto [entry, is_new] = index_.try_emplace(word, words_.size());
    if (is_new) {
      words_.emplace_back();
      for (const char c : word) words_.back().ids.push_back(static_cast<unsigned char>(c));
    }
    ++words_[entry->second].count;
    text.remove_prefix(word.size());
  }
  learn(vocabulary);
}

void Tokenizer::learn(int vocabulary) {
  std::unordered_map<std::uint64_t, long> counts;
  while (static_cast<int>(bytes_of_.size()) < vocabulary) {
    counts.clear();
    for (const Word& word : words_) {
      for (std::size_t i = 1; i < word.ids.size(); ++i) counts[pair_key(word.ids[i - 1], word.ids[i])] += word.count;
    }
    std::uint64_t best = 0;
    long best_count = 1;  // a pair that occurs once is not worth an id
    for (const auto& [pair, count] : counts) {
      if (count > best_count || (count == best_count && count > 1 && pair < best)) {
        best = pair;
        best_count = count;
      }
    }
    if (best_count == 1) break;
    const int left = static_cast<int>(best >> 32);
    const int right = static_cast<int>(best & 0xffffffffU);
    const int joined = static_cast<int>(bytes_of_.size());
    bytes_of_.push_back(bytes_of_[left] + bytes_of_[right]);
    for (Word& word : words_) join(word.ids, left, right, joined);
  }
}

std::vector<int> Tokenizer::encode(std::string_view piece) const {
  std::vector<int> ids;
  while (!piece.empty()) {
    const std::string word(piece.substr(0, word_length(piece)));
    const auto found = index_.find(word);
    if (found == index_.end()) throw std::runtime_error(fmt::format("tokenizer: '{}' was not in the text", word));
    const std::vector<int>& of_word = words_[found->second].ids;
    ids.insert(ids.end(), of_word.begin(), of_word.end());
    piece.remove_prefix(word.size());
  }
  return ids;
}

std::string Tokenizer::spell(int id) const {
  std::string visible;
  for (const char c : bytes_of_[id]) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '\n') {
      visible += "\\n";
    } else if (byte < 0x20 || byte >= 0x7f) {
      visible += fmt::format("\\x{:02x}", byte);
    } else {
      visible += c;
    }
  }
  return visible;
}

}  // namespace moe
