// SPDX-License-Identifier: MIT
// Byte-pair encoding, learned from the text itself: ids 0..255 are the bytes, each further id joins two older ones.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace moe {

class Tokenizer {
 public:
  /// Learns from `text` by joining, again and again, the most frequent pair of neighbours inside words. The same text
  /// always gives the same vocabulary: ties go to the pair with the smaller ids.
  Tokenizer(std::string_view text, int vocabulary);

  /// Ids of a piece of the text that was learned from, which must not begin or end inside a word.
  std::vector<int> encode(std::string_view piece) const;

  int vocabulary() const { return static_cast<int>(bytes_of_.size()); }
  /// What an id stands for, with control characters made visible.
  std::string spell(int id) const;

 private:
  struct Word {
    std::vector<int> ids;
    long count = 0;
  };
  void learn(int vocabulary);

  std::vector<Word> words_;                             // in order of first appearance
  std::unordered_map<std::string, std::size_t> index_;  // word -> words_
  std::vector<std::string> bytes_of_;                   // by id
};

}  // namespace moe
