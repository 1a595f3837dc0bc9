// SPDX-License-Identifier: MIT
// Reads text files, cuts them into paragraphs and fills one batch per rank.
#include "text.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string_view>
#include <system_error>

#include "tokenizer.h"

namespace moe {
namespace {

constexpr const char* kDefaultTexts = "/usr/share/common-licenses";  // package base-files: on every Debian and Ubuntu

/// Regular files only: the folder also has links that would repeat a text ("GPL" is the newest GPL).
std::vector<std::string> default_files() {
  std::vector<std::string> files;
  std::error_code absent;
  for (const auto& entry : std::filesystem::directory_iterator(kDefaultTexts, absent)) {
    if (!entry.is_symlink() && entry.is_regular_file()) files.push_back(entry.path().string());
  }
  if (files.empty()) throw std::runtime_error(fmt::format("no text in {}: name one with --text FILE", kDefaultTexts));
  std::sort(files.begin(), files.end());
  return files;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(fmt::format("cannot read {}", path));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::erase(text, '\r');
  return text;
}

constexpr const char* kSpaces = " \n\t\r\f";

/// Views of the parts that `separator` cuts the text into. White space between parts belongs to the part after it.
std::vector<std::string_view> cut(std::string_view text, std::string_view separator) {
  std::vector<std::string_view> parts;
  while (!text.empty()) {
    const std::size_t content = text.find_first_not_of(kSpaces);
    if (content == std::string_view::npos) break;
    const std::size_t next = std::min(text.find(separator, content), text.size());
    const std::size_t end = text.find_last_not_of(kSpaces, next - 1) + 1;
    parts.push_back(text.substr(0, end));
    text.remove_prefix(end);
  }
  return parts;
}

/// Parts between empty lines; single lines where that does not give every rank something to read.
std::vector<std::string_view> paragraphs_of(std::string_view text, int ranks) {
  auto paragraphs = cut(text, "\n\n");
  if (paragraphs.size() < static_cast<std::size_t>(ranks)) paragraphs = cut(text, "\n");
  return paragraphs;
}

using Paragraph = std::vector<int>;  // of token ids

/// Whole paragraphs from `begin` on while they fit. One that is too long for any batch is cut.
std::vector<int> fill_batch(const std::vector<Paragraph>& all, std::size_t begin, std::size_t end, std::size_t most) {
  std::vector<int> batch;
  for (std::size_t p = begin; p < end; ++p) {
    if (!batch.empty() && batch.size() + all[p].size() > most) break;
    batch.insert(batch.end(), all[p].begin(), all[p].end());
    if (batch.size() > most) batch.resize(most);
  }
  return batch;
}

}  // namespace

std::size_t Corpus::tokens_used() const {
  std::size_t sum = 0;
  for (const auto& batch : batches) sum += batch.size();
  return sum;
}

Corpus read_corpus(const Settings& settings) {
  Corpus corpus;
  corpus.files = settings.texts.empty() ? default_files() : settings.texts;
  std::string text;
  for (const std::string& file : corpus.files) text += read_file(file) + "\n\n";
  corpus.bytes = text.size();

  const Tokenizer tokenizer(text, settings.vocabulary);
  std::vector<Paragraph> paragraphs;
  for (const std::string_view paragraph : paragraphs_of(text, settings.ranks)) {
    paragraphs.push_back(tokenizer.encode(paragraph));
    corpus.tokens += paragraphs.back().size();
  }
  if (paragraphs.empty()) throw std::runtime_error("the text files hold nothing but white space");
  for (int id = 0; id < tokenizer.vocabulary(); ++id) corpus.spelling.push_back(tokenizer.spell(id));

  const auto ranks = static_cast<std::size_t>(settings.ranks);
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const std::size_t begin = rank * paragraphs.size() / ranks;
    const std::size_t end = (rank + 1) * paragraphs.size() / ranks;
    corpus.batches.push_back(fill_batch(paragraphs, begin, end, static_cast<std::size_t>(settings.tokens)));
  }
  return corpus;
}

}  // namespace moe
