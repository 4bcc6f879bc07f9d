#include "io/files.h"

#include <chrono>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "tests/io/helpers.h"

namespace sla2::io {
namespace {
namespace fs = std::filesystem;
using test::error_of;
using test::expect_error;
using test::expect_in;
using test::TemporaryFolder;

TEST(IoFiles, RoundTripCreatesFolders) {
  TemporaryFolder folder;
  const fs::path path = folder / "a/b/c.txt";
  const std::string contents("one\0two", 7);
  write_file(path, contents);
  EXPECT_EQ(read_file(path, 7), contents);
  write_file(path, std::string_view());
  EXPECT_EQ(read_file(path, 0), "");
  EXPECT_EQ(std::distance(fs::directory_iterator(path.parent_path()), {}), 1);
}

TEST(IoFiles, PartsFollowEachOther) {
  TemporaryFolder folder;
  const std::string a = "ab", b = "cd";
  const std::vector<std::span<const std::byte>> parts{
      std::as_bytes(std::span(a)), {}, std::as_bytes(std::span(b))};
  write_file(folder / "x", parts);
  EXPECT_EQ(read_file(folder / "x", 100), "abcd");
}

TEST(IoFiles, ReadNamesWhatIsWrong) {
  TemporaryFolder folder;
  const std::string missing = error_of([&] { read_file(folder / "none", 10); });
  expect_in("none", missing);
  expect_in("No such file", missing);
  expect_error([&] { read_file(folder.path(), 10); }, "not a regular file");
  write_file(folder / "big", std::string(11, 'x'));
  expect_error([&] { read_file(folder / "big", 10); }, "must have at most 10 bytes, got 11");
  ASSERT_EQ(::mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect_error([&] { read_file(folder / "pipe", 10); }, "not a regular file");
}

TEST(IoFiles, ReadsFilesOfUnknownSize) {
  EXPECT_FALSE(read_file("/proc/self/status", 1 << 20).empty());
}

TEST(IoFiles, OnlyRegularFilesAreReplaced) {
  TemporaryFolder folder;
  expect_error([] { write_file("/dev/null", "x"); }, "not a regular file");
  expect_error([&] { write_file(folder.path(), "x"); }, "not a regular file");
  expect_error([&] { write_file(folder.path() / "", "x"); }, "must have a name");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
}

TEST(IoFiles, LinksStayLinks) {
  TemporaryFolder folder;
  write_file(folder / "real", "old");
  fs::create_symlink("real", folder / "link");
  write_file(folder / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(read_file(folder / "real", 10), "new");
}

TEST(IoFiles, LongNamesFit) {
  TemporaryFolder folder;
  const fs::path path = folder / std::string(255, 'n');
  write_file(path, "x");
  EXPECT_EQ(read_file(path, 10), "x");
  expect_error([&] { write_file(folder / std::string(256, 'n'), "x"); }, "name too long");
  EXPECT_EQ(folder.count(), 1);
}

TEST(IoFiles, FileInPlaceOfFolder) {
  TemporaryFolder folder;
  write_file(folder / "file", "x");
  expect_error([&] { write_file(folder / "file/inside", "x"); }, "file: cannot create the folder");
  expect_error([&] { make_output_folder(folder / "file"); }, "cannot create the output folder");
  EXPECT_EQ(read_file(folder / "file", 10), "x");
}

// Runs `check` in a child without root's rights; its messages reach the log, its failure the
// status.
int status_without_root(const std::function<bool()>& check) {
  const pid_t child = ::fork();
  if (child == 0) {
    if (::geteuid() == 0 && ::setuid(65534) != 0) ::_exit(2);
    ::_exit(check() ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

TEST(IoFiles, UnwritableFolderIsNamed) {
  TemporaryFolder folder;
  const fs::path closed = folder / "closed";
  make_output_folder(closed);
  EXPECT_TRUE(fs::is_empty(closed));
  fs::permissions(closed, fs::perms(0555));
  EXPECT_EQ(status_without_root([&] {
              try {
                make_output_folder(closed);
              } catch (const Error& error) {
                const std::string message = error.what();
                return message.find(closed.string() + " is not writable") != std::string::npos &&
                       message.find("Permission denied") != std::string::npos;
              }
              return false;
            }),
            0);
  fs::permissions(closed, fs::perms(0755));
}

TEST(IoFiles, FileSizeLimitKeepsTheOldFile) {
  TemporaryFolder folder;
  write_file(folder / "x", "old");
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit limit{.rlim_cur = 4096, .rlim_max = before.rlim_max};
  const auto old_handler = ::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
  const std::string message = error_of([&] { write_file(folder / "x", std::string(8192, 'n')); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  ::signal(SIGXFSZ, old_handler);
  expect_in("cannot write: File too large", message);
  EXPECT_EQ(read_file(folder / "x", 100), "old");
  EXPECT_EQ(folder.count(), 1);
}

TEST(IoFiles, FullDiskKeepsTheOldFile) {
  TemporaryFolder folder;
  if (::mount("tmpfs", folder.path().c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "mounting a small disk needs root's rights";
  }
  write_file(folder / "x", "old");
  const std::string message =
      error_of([&] { write_file(folder / "x", std::string(1 << 20, 'n')); });
  const std::string kept = read_file(folder / "x", 100);
  const auto files = folder.count();
  ::umount(folder.path().c_str());
  expect_in("cannot write: No space left on device", message);
  EXPECT_EQ(kept, "old");
  EXPECT_EQ(files, 1);
}

TEST(IoFiles, KilledInTheMiddleTheFileIsWhole) {
  TemporaryFolder folder;
  const fs::path path = folder / "x";
  constexpr std::size_t kBytes = std::size_t{1} << 22;
  write_file(path, std::string(kBytes, 'a'));
  int replaced = 0;
  for (int round = 0; round < 12; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (char letter = 'b';; letter = letter == 'z' ? 'b' : static_cast<char>(letter + 1)) {
        write_file(path, std::string(kBytes, letter));
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(7 * round + 3));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const std::string contents = read_file(path, kBytes);
    ASSERT_EQ(contents.size(), kBytes);
    ASSERT_EQ(contents.find_first_not_of(contents.front()), std::string::npos);
    replaced += contents.front() != 'a' ? 1 : 0;
  }
  EXPECT_GT(replaced, 0) << "the child never got as far as a whole file";
}

}  // namespace
}  // namespace sla2::io
