// sla2 demo: from a real video to a report, one command.
#include <fmt/format.h>

#include "cli/command.h"
#include "io/files.h"
#include "io/video_file.h"
#include "video/data.h"
#include "video/demo.h"

namespace sla2::cli {

namespace {

class Demo final : public Command {
 public:
  const char* name() const override { return "demo"; }
  const char* summary() const override {
    return "From a real video to SLA2 videos and a report: both stages, every method, one page";
  }

  void declare(Options& options) override {
    options.add("--out", out_, "folder of the report").no_effect();
    options.add("--preset", preset_, "small: minutes on two cores; large: for a GPU")
        .one_of({"small", "large"});
    options.add("--data", data_, "your own video files, shown video to video");
    options.add("--model", model_, "folder of the model (default: the one that comes with sla2)");
    options.add("--stage1-steps", stage1_steps_, "steps of stage 1 (default: the preset's)")
        .range(1, 1e9);
    options.add("--stage2-steps", stage2_steps_, "steps of stage 2 (default: the preset's)")
        .range(1, 1e9);
    options.add("--lr", lr_, "learning rate of SLA2's stage 2 (default: the preset's)")
        .above(0, 10);
    options.add("--sla-lr", sla_lr_, "learning rate of SLA (default: the preset's)").above(0, 10);
    options.add("--sampling-steps", sampling_steps_, "steps of the sampler (default: the preset's)")
        .range(1, 1000);
  }

  void run(Session& session) override {
    video::DemoOptions demo = video::demo_preset(preset_);
    demo.out = out_;
    if (model_.empty()) model_ = video::default_model();
    demo.model = model_;
    demo.train_inputs = video::default_clips();
    if (!data_.empty()) demo.own_inputs = io::list_videos(data_);
    demo.command = session.command_line;
    settle(stage1_steps_, demo.stage1_steps);
    settle(stage2_steps_, demo.stage2_steps);
    settle(lr_, demo.sla2_lr);
    settle(sla_lr_, demo.sla_lr);
    settle(sampling_steps_, demo.sampling_steps);
    io::make_output_folder(out_);
    session.save_options(out_);
    try {
      video::run_demo(demo, session.run);
    } catch (const video::Interrupted&) {
      throw video::Interrupted(
          fmt::format("interrupted; what is done lies in {}, the same command goes on from there",
                      out_.string()));
    }
    fmt::print("report: {}\n", std::filesystem::absolute(out_ / "report.html").string());
  }

 private:
  /// The option wins over the preset; without it the preset's is what is saved.
  template <typename T>
  static void settle(std::optional<T>& option, T& setting) {
    if (option) setting = *option;
    option = setting;
  }

  std::filesystem::path out_ = "out/demo", model_;
  std::vector<std::filesystem::path> data_;
  std::string preset_ = "small";
  std::optional<std::int64_t> stage1_steps_, stage2_steps_, sampling_steps_;
  std::optional<double> lr_, sla_lr_;
};

}  // namespace

std::unique_ptr<Command> make_demo() { return std::make_unique<Demo>(); }

}  // namespace sla2::cli
