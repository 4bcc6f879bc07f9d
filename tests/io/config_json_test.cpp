#include "io/config_json.h"

#include <cmath>
#include <limits>
#include <tuple>

#include "io/files.h"
#include "tests/io/helpers.h"

namespace sla2::io {
namespace {
using test::error_of;
using test::expect_error;
using test::expect_in;
using test::TemporaryFolder;

nlohmann::json json_of(const std::string& text) { return parse_json(text, "f"); }
Config config_of(const std::string& text) { return config_from_json(json_of(text)); }

TEST(IoConfig, DefaultsArePythons) {
  EXPECT_EQ(to_json(Config{}),
            json_of(R"({"keep": 0.03, "block_q": 128, "block_k": 64, "scale": null,
      "feature_map": "softmax", "precision": "int8", "routing": "hard", "tau": 0.1,
      "score_norm": "none", "linear_keys": "smoothed", "linear_scope": "complement",
      "backward": "paper", "method": "sla2"})"));
  EXPECT_EQ(to_json(config_of("{}")), to_json(Config{}));
}

TEST(IoConfig, EveryFieldAndNameRoundTrips) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> fields{
      {"keep", {"0.5", "1"}},
      {"block_q", {"32", "64", "128", "256"}},
      {"block_k", {"32", "64", "128", "256"}},
      {"scale", {"null", "0.25", "2"}},
      {"tau", {"0.5"}},
      {"feature_map", {"\"softmax\"", "\"elu\"", "\"relu\""}},
      {"precision", {"\"int8\"", "\"fp8\"", "\"bf16\"", "\"fp32\""}},
      {"routing", {"\"hard\"", "\"soft\""}},
      {"score_norm", {"\"none\"", "\"softmax\""}},
      {"linear_keys", {"\"smoothed\"", "\"raw\""}},
      {"linear_scope", {"\"complement\"", "\"all\""}},
      {"backward", {"\"paper\"", "\"matched\""}},
      {"method", {"\"sla2\"", "\"sla\""}}};
  EXPECT_EQ(fields.size(), to_json(Config{}).size());
  for (const auto& [key, values] : fields) {
    for (const std::string& value : values) {
      const Config config = config_of("{\"" + key + "\": " + value + "}");
      EXPECT_EQ(to_json(config)[key], json_of(value)) << key;
      EXPECT_EQ(to_json(config_from_json(to_json(config))), to_json(config)) << key;
    }
  }
}

TEST(IoConfig, WrongValuesAreNamed) {
  const std::vector<std::tuple<std::string, std::string>> cases{
      {R"([])", "config must be a JSON object, got []"},
      {R"({"kep": 0.1})", "config: unknown key \"kep\", did you mean \"keep\"?"},
      {R"({"blockq": 64})", "did you mean \"block_q\"?"},
      {R"({"zzzzzzzz": 1})", "config: unknown key \"zzzzzzzz\""},
      {R"({"keep": "0.1"})", "config: keep must be a finite number, got \"0.1\""},
      {R"({"keep": true})", "config: keep must be a finite number, got true"},
      {R"({"keep": null})", "config: keep must be a finite number, got null"},
      {R"({"keep": 0})", "keep"},
      {R"({"keep": 1.5})", "keep"},
      {R"({"tau": 0})", "tau"},
      {R"({"block_q": 64.0})", "config: block_q must be an integer, got 64.0"},
      {R"({"block_q": 48})", "block_q"},
      {R"({"block_q": 18446744073709551615})", "config: block_q must be an integer in ["},
      {R"({"block_q": 99999999999999999999})", "config: block_q must be an integer, got"},
      {R"({"scale": "x"})", "config: scale must be a finite number"},
      {R"({"precision": "int4"})",
       R"(config: precision must be one of "int8", "fp8", "bf16", "fp32", got "int4")"},
      {R"({"precision": 8})", "config: precision must be one of"},
      {R"({"method": null})", "config: method must be one of"}};
  for (const auto& [text, message] : cases) expect_error([&] { config_of(text); }, message);
  const std::string lone = error_of([&] { config_of(R"({"zzzzzzzz": 1})"); });
  EXPECT_EQ(lone.find("did you mean"), std::string::npos) << lone;
}

TEST(IoConfig, NotANumberIsRefused) {
  for (const double value : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    nlohmann::json json = {{"keep", value}};
    expect_error([&] { config_from_json(json); }, "config: keep must be a finite number");
  }
  expect_error([] { json_of(R"({"keep": NaN})"); }, "f: line 1, column");
  expect_error([] { json_of(R"({"keep": 1e999})"); }, "f: line 1, column");
}

TEST(IoConfig, TextErrorsHaveLineAndColumn) {
  expect_error([] { json_of("{\n  \"a\": 1,\n  oops\n}"); }, "f: line 3, column 3: ");
  expect_error([] { json_of(""); }, "f: line 1, column 0: ");
  expect_error([] { json_of("{\n\"a\": 1, \"b\": {\"a\": 2},\n \"a\": 3}"); },
               "f: line 3, column 4: keys must be unique, got \"a\" twice");
  EXPECT_EQ(json_of(R"([{"a":1},{"a":2}])").size(), 2U);
  const std::string open(64, '[');
  EXPECT_NO_THROW(json_of(open + std::string(64, ']')));
  expect_error([&] { json_of(open + "[" + std::string(65, ']')); }, "nested at most 64 deep");
  expect_error([] { json_of(std::string(100000, '[')); }, "nested at most 64 deep");
  expect_error([] { json_of(std::string((16 << 20) + 1, ' ')); },
               "must have at most 16777216 bytes");
}

TEST(IoConfig, FilesAreNamed) {
  TemporaryFolder folder;
  write_file(folder / "c.json", "{\"keep\": 0.25}");
  EXPECT_EQ(config_from_json(read_json(folder / "c.json")).keep, 0.25);
  write_file(folder / "bad.json", "{");
  expect_error([&] { read_json(folder / "bad.json"); },
               (folder / "bad.json").string() + ": line 1");
  expect_error([&] { read_json(folder / "none.json"); }, "No such file");
}

TEST(IoJsonObject, ReadsEveryType) {
  const nlohmann::json json = json_of(R"({"flag": true, "i": -3, "l": -5000000000, "u": 5000000000,
      "f": 0.5, "d": 2, "s": "text", "o": null, "p": 4, "v": [1, 2], "a": [4, 4, 4], "j": {"x": 1},
      "n": [[1], []], "later": 0})");
  bool flag = false;
  std::int32_t i = 0;
  std::int64_t l = 0;
  std::uint64_t u = 0;
  float f = 0;
  double d = 0, kept = 7;
  std::string s;
  std::optional<double> o = 1.0, p;
  std::vector<std::int64_t> v;
  std::array<std::int64_t, 3> a{};
  nlohmann::json j;
  std::vector<std::vector<std::int64_t>> n;
  JsonObject(json, "f")
      .required("flag", flag)
      .required("i", i)
      .required("l", l)
      .required("u", u)
      .required("f", f)
      .required("d", d)
      .required("s", s)
      .optional("o", o)
      .optional("p", p)
      .required("v", v)
      .required("a", a)
      .required("j", j)
      .required("n", n)
      .ignore("later")
      .optional("kept", kept)
      .finish();
  EXPECT_TRUE(flag);
  EXPECT_EQ(i, -3);
  EXPECT_EQ(l, -5000000000);
  EXPECT_EQ(u, 5000000000U);
  EXPECT_EQ(f, 0.5F);
  EXPECT_EQ(d, 2.0);
  EXPECT_EQ(s, "text");
  EXPECT_FALSE(o.has_value());
  EXPECT_EQ(p, 4.0);
  EXPECT_EQ(v, (std::vector<std::int64_t>{1, 2}));
  EXPECT_EQ(a, (std::array<std::int64_t, 3>{4, 4, 4}));
  EXPECT_EQ(j["x"], 1);
  EXPECT_EQ(n.size(), 2U);
  EXPECT_EQ(kept, 7.0);
}

TEST(IoJsonObject, RefusesWhatDoesNotFit) {
  const nlohmann::json json =
      json_of(R"({"i": 3000000000, "f": 1e39, "u": -1, "v": [1, "x"], "a": [1, 2]})");
  JsonObject object(json, "f");
  std::int32_t i = 0;
  float f = 0;
  std::uint64_t u = 0;
  std::vector<std::int64_t> v{9};
  std::array<std::int64_t, 3> a{};
  expect_error([&] { object.optional("i", i); }, "f: i must be an integer in [-2147483648, 214748");
  expect_error([&] { object.optional("f", f); }, "f: f must be a number in the range of 32-bit");
  expect_error([&] { object.optional("u", u); }, "f: u must be an integer in [0, ");
  expect_error([&] { object.optional("v", v); }, "f: v[1] must be an integer, got \"x\"");
  expect_error([&] { object.optional("a", a); }, "f: a must be a list of 3, got [1,2]");
  expect_error([&] { object.required("none", a); }, "f: none is missing");
  EXPECT_EQ(v, std::vector<std::int64_t>{9});
}

}  // namespace
}  // namespace sla2::io
