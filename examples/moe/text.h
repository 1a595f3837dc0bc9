// SPDX-License-Identifier: MIT
// From files to batches: which text is read, and which of its tokens each rank gets.
#pragma once

#include <string>
#include <vector>

#include "settings.h"

namespace moe {

struct Corpus {
  std::vector<std::string> files;  // that were read
  std::size_t bytes = 0;
  std::size_t tokens = 0;                 // in all the text, not only those used
  std::vector<std::vector<int>> batches;  // [rank]: token ids
  std::vector<std::string> spelling;      // of each id, for messages

  std::size_t tokens_used() const;
};

/// Reads the settings' texts (or the machine's licence texts), learns a vocabulary from them and deals paragraphs out
/// to the ranks: each begins in its own part of the text and takes whole paragraphs as long as they fit in
/// settings.tokens. So batches differ in length, as real ones do. Throws std::runtime_error where a file cannot be read
/// or has no text.
Corpus read_corpus(const Settings& settings);

}  // namespace moe
