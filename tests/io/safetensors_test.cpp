#include "io/safetensors.h"

#include <array>
#include <cstring>
#include <sys/stat.h>
#include <tuple>

#include <fmt/format.h>

#include "io/files.h"
#include "io/process.h"
#include "tests/io/helpers.h"

namespace sla2::io {
namespace {
using test::error_of;
using test::expect_error;
using test::expect_in;
using test::TemporaryFolder;

std::string file_of(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + header + data;
}

std::span<const std::byte> bytes_in(const std::string& text) {
  return std::as_bytes(std::span(text));
}

void parse(const std::string& file) { SafetensorsFile(bytes_in(file), "f"); }

std::string tensor(const std::string& name, const std::string& type, const std::string& shape,
                   const std::string& offsets) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, type, shape,
                     offsets);
}

TEST(IoSafetensors, RoundTripOfEveryType) {
  TemporaryFolder folder;
  const std::string data(64, '\7');
  std::map<std::string, TensorEntry> tensors;
  for (int i = 0; i < 10; ++i) {
    const auto type = static_cast<ElementType>(i);
    tensors[std::string("t.") + name_of(type)] = {
        type, {2, 3}, bytes_in(data).first(6 * bytes_of(type))};
  }
  tensors["scalar"] = {ElementType::kF32, {}, bytes_in(data).first(4)};
  tensors["empty"] = {ElementType::kI64, {0, 5}, {}};
  const std::map<std::string, std::string> metadata{{"format", "pt"}, {"\"odd\"", "é\n"}};
  write_safetensors(folder / "x.safetensors", tensors, metadata);

  SafetensorsFile file(folder / "x.safetensors");
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const auto& [name, written] : tensors) {
    const TensorEntry& read = file.tensors().at(name);
    EXPECT_EQ(read.type, written.type) << name;
    EXPECT_EQ(read.shape, written.shape) << name;
    ASSERT_EQ(read.data.size(), written.data.size()) << name;
    EXPECT_TRUE(std::equal(read.data.begin(), read.data.end(), written.data.begin())) << name;
    const auto address = reinterpret_cast<std::uintptr_t>(read.data.data());
    EXPECT_EQ(address % bytes_of(read.type), 0U) << name << " is not aligned to its elements";
  }
  SafetensorsFile moved(std::move(file));
  EXPECT_EQ(moved.tensors().size(), tensors.size());
}

TEST(IoSafetensors, NoTensorsAndPaddedHeader) {
  TemporaryFolder folder;
  write_safetensors(folder / "none", {});
  EXPECT_TRUE(SafetensorsFile(folder / "none").tensors().empty());
  const std::string padded = file_of("{" + tensor("a", "U8", "[1]", "[0,1]") + "}    ", "x");
  EXPECT_EQ(SafetensorsFile(bytes_in(padded), "f").tensors().at("a").data.size(), 1U);
}

TEST(IoSafetensors, EveryRuleOfTheFileIsChecked) {
  const std::string a = tensor("a", "F32", "[2]", "[0,8]");
  const std::string eight(8, 'x');
  const std::vector<std::tuple<std::string, std::string>> cases{
      {"", "must have at least 8 bytes, got 0"},
      {"1234567", "must have at least 8 bytes, got 7"},
      {std::string(8, '\xff'), "header length must be at most 0 (what the file holds)"},
      {std::string("\x09\0\0\0\0\0\0\0{}", 10), "header length must be at most 2"},
      {file_of("", ""), "header must begin with '{'"},
      {file_of(" {}", ""), "header must begin with '{'"},
      {file_of("{", ""), "f: header: line 1, column"},
      {file_of("{}x", ""), "f: header: line 1, column"},
      {file_of("{\"a\":\xff}", ""), "f: header: line 1"},
      {file_of("{" + a + "," + a + "}", eight), "keys must be unique, got \"a\" twice"},
      {file_of(R"({"a":{"b":[[1]]}})", ""), "nested at most 3 deep"},
      {file_of(R"({"a":[]})", ""), "tensor \"a\" must be a JSON object, got []"},
      {file_of(R"({"a":{}})", ""), "tensor \"a\": dtype is missing"},
      {file_of("{" + tensor("a", "F8_E4M3", "[8]", "[0,8]") + "}", eight),
       "dtype must be one of F64, F32"},
      {file_of(R"({"a":{"dtype":3,"shape":[],"data_offsets":[0,8]}})", eight),
       "dtype must be a string, got 3"},
      {file_of("{" + tensor("a", "F32", "[2.0]", "[0,8]") + "}", eight),
       "shape[0] must be an integer, got 2.0"},
      {file_of("{" + tensor("a", "F32", "[-2]", "[0,8]") + "}", eight),
       "shape must be sizes from 0"},
      {file_of("{" + tensor("a", "F32", "[4294967296,4294967296]", "[0,0]") + "}", ""),
       "product in bytes fits 64 bits"},
      {file_of("{" + tensor("a", "F32", "[4611686018427387904]", "[0,0]") + "}", ""),
       "product in bytes fits 64 bits"},
      {file_of("{" + tensor("a", "F32", "[3]", "[0,8]") + "}", eight),
       "must span 12 bytes for its shape and dtype, got 8"},
      {file_of("{" + tensor("a", "F32", "[2]", "[8,0]") + "}", eight), "must lie in order"},
      {file_of("{" + tensor("a", "F32", "[2]", "[1,9]") + "}", eight), "got [1, 9]"},
      {file_of("{" + tensor("a", "F32", "[2]", "[-8,0]") + "}", eight), "data_offsets[0] must be"},
      {file_of("{" + tensor("a", "F32", "[2]", "[0,8,8]") + "}", eight),
       "data_offsets must be a list of 2"},
      {file_of("{" + tensor("a", "F32", "[2]", "[0,18446744073709551616]") + "}", eight),
       "data_offsets[1] must be an integer"},
      {file_of(
           "{" + tensor("a", "U8", "[4]", "[0,4]") + "," + tensor("b", "U8", "[4]", "[2,6]") + "}",
           "123456"),
       "tensor \"b\" must begin at byte 4 of the data (overlap), got 2"},
      {file_of(
           "{" + tensor("a", "U8", "[2]", "[0,2]") + "," + tensor("b", "U8", "[2]", "[4,6]") + "}",
           "123456"),
       "tensor \"b\" must begin at byte 2 of the data (gap), got 4"},
      {file_of("{" + a + "}", eight + "y"), "must cover the 9 bytes of data, got 8"},
      {file_of("{}", "y"), "must cover the 1 bytes of data, got 0"},
      {file_of(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"shap":1}})", ""),
       "unknown key \"shap\", did you mean \"shape\"?"},
      {file_of(R"({"__metadata__":{"a":1}})", ""), "__metadata__: a must be a string, got 1"},
      {file_of(R"({"__metadata__":"x"})", ""), "__metadata__ must be an object of strings"}};
  for (const auto& [file, message] : cases) expect_error([&] { parse(file); }, message);
}

TEST(IoSafetensors, HeaderLongerThan100MBIsRefusedUnread) {
  std::string file(100'000'100, ' ');
  const std::uint64_t length = 100'000'001;
  std::memcpy(file.data(), &length, sizeof(length));
  expect_error([&] { parse(file); }, "must be at most 100000000 (100 MB), got 100000001");
}

TEST(IoSafetensors, FilesThatAreNone) {
  TemporaryFolder folder;
  expect_error([&] { SafetensorsFile(folder / "none"); }, "No such file");
  expect_error([&] { SafetensorsFile(folder.path()); }, "not a regular file");
  write_file(folder / "empty", "");
  const std::string empty = error_of([&] { SafetensorsFile(folder / "empty"); });
  expect_in((folder / "empty").string(), empty);
  expect_in("at least 8 bytes, got 0", empty);
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_error([&] { SafetensorsFile(folder / "pipe"); }, "not a regular file");
}

TEST(IoSafetensors, EveryTruncationIsRefused) {
  const std::string whole = file_of(
      "{" + tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "U8", "[3]", "[8,11]") + "}",
      "12345678abc");
  EXPECT_NO_THROW(parse(whole));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse(whole.substr(0, size)), Error) << "cut to " << size;
  }
}

TEST(IoSafetensors, WriterRefusesWhatItCouldNotRead) {
  TemporaryFolder folder;
  const std::string four = "1234";
  const auto write = [&](const std::string& name, std::vector<std::int64_t> shape) {
    write_safetensors(folder / "x",
                      {{name, {ElementType::kF32, std::move(shape), bytes_in(four)}}});
  };
  expect_error([&] { write("a", {2}); }, "got 4 bytes");
  expect_error([&] { write("a", {-1}); }, "shape [-1]");
  expect_error([&] { write("__metadata__", {1}); }, "must have another name than __metadata__");
  expect_error([&] { write("\xff", {1}); }, "must be UTF-8");
  EXPECT_EQ(folder.count(), 0);
}

constexpr const char* kPython = R"(
import sys, numpy
from safetensors import safe_open
from safetensors.numpy import save_file, load_file
ours, theirs = sys.argv[1:]
tensors = load_file(ours)
assert sorted(tensors) == ["a", "b", "c"], tensors
assert tensors["a"].dtype == numpy.float32 and tensors["a"].tolist() == [[1.0, -2.5]]
assert tensors["b"].dtype == numpy.uint8 and tensors["b"].tolist() == [1, 2, 3]
assert tensors["c"].shape == (0, 4)
with safe_open(ours, "numpy") as file:
    assert file.metadata() == {"format": "pt"}
save_file({"x": numpy.arange(5, dtype=numpy.int64), "y": numpy.array([[0.5]], numpy.float16),
           "z": numpy.array([True, False])}, theirs, {"who": "python"})
)";

TEST(IoSafetensors, PythonReadsOursAndWeReadPythons) {
  const std::string python = SLA2_SOURCE_DIR "/.venv/bin/python";
  if (!std::filesystem::exists(python)) GTEST_SKIP() << "no " << python << ": run `make setup`";
  TemporaryFolder folder;
  const std::array<float, 2> a{1.0F, -2.5F};
  const std::string b = "\1\2\3";
  write_safetensors(folder / "ours",
                    {{"a", {ElementType::kF32, {1, 2}, std::as_bytes(std::span(a))}},
                     {"b", {ElementType::kU8, {3}, bytes_in(b)}},
                     {"c", {ElementType::kF16, {0, 4}, {}}}},
                    {{"format", "pt"}});
  ProcessOptions options;
  options.arguments = {python, "-c", kPython, (folder / "ours").string(),
                       (folder / "theirs").string()};
  const ProcessResult result = run_process(options);
  ASSERT_TRUE(result.end == ProcessEnd::kExited && result.code == 0) << result.error_text;

  const SafetensorsFile theirs(folder / "theirs");
  EXPECT_EQ(theirs.metadata().at("who"), "python");
  const TensorEntry& x = theirs.tensors().at("x");
  EXPECT_EQ(x.type, ElementType::kI64);
  EXPECT_EQ(x.shape, std::vector<std::int64_t>{5});
  std::array<std::int64_t, 5> values{};
  std::memcpy(values.data(), x.data.data(), x.data.size());
  EXPECT_EQ(values, (std::array<std::int64_t, 5>{0, 1, 2, 3, 4}));
  EXPECT_EQ(theirs.tensors().at("y").type, ElementType::kF16);
  EXPECT_EQ(theirs.tensors().at("z").type, ElementType::kBool);
}

}  // namespace
}  // namespace sla2::io
