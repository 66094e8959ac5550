//! What a user gets wrong at the command line, and what `coordinator` says about it: one line that names the file or the
//! key, exit code 1, and never a panic.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use experiment::{Experiment, Row, RunDirectory, Seed};
use model::{Adapter, AdapterConfig};
use tempfile::TempDir;

const SMOKE: &str = include_str!("../../configs/smoke.toml");

#[test]
fn a_home_is_neither_overwritten_nor_taken_for_granted() {
    let desk = Desk::new();
    desk.write("file", "");
    let cases: [(&str, &[&str]); 6] = [
        (
            "init home",
            &[
                "failed to make a home in home",
                "already holds audit.head, audit.jsonl, ca.key",
                "choose another directory",
            ],
        ),
        ("init file", &["failed to make the directory file", "move it away"]),
        ("init new --address nonsense", &["\"nonsense\" is not host:port", "192.0.2.7:4433", "--address"]),
        ("init new --address 0.0.0.0:4433", &["failed to accept --address", "add after it one"]),
        ("invite nowhere press-1", &["failed to open nowhere", "`coordinator init nowhere`"]),
        ("run smoke.toml --home nowhere", &["failed to open nowhere", "`coordinator init nowhere`"]),
    ];
    let before = fs::read(desk.path("home/ca.key")).unwrap();
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
    assert_eq!(fs::read(desk.path("home/ca.key")).unwrap(), before);
    assert!(!desk.path("new").exists());
}

#[test]
fn a_device_is_revoked_by_its_name_and_the_audit_log_says_so() {
    let desk = Desk::new();
    desk.check_works("invite home press-1");
    desk.check_fails("revoke home press-2", &["failed to revoke press-2", "nobody of that name was invited"]);
    desk.check_works("revoke home press-1");
    desk.check_works("invite home press-1 --out new.invite");
    desk.check_works("audit-log verify home");
    let log = fs::read_to_string(desk.path("home/audit.jsonl")).unwrap();
    assert_eq!(log.matches("press-1").count(), 3, "{log}");
    desk.check_fails("audit-log verify home --head 00", &["--head", "64 hexadecimal digits"]);
    desk.check_fails(
        &format!("audit-log verify home --head {}", "00".repeat(32)),
        &["failed to believe home/audit.jsonl", "no line up to here has the hash 0000"],
    );
    desk.write("home/audit.jsonl", log.replacen("press-1", "press-9", 1));
    let output = desk.command("invite home mill-1").output().unwrap();
    let warned = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{warned}");
    for expected in ["home/audit.jsonl: line 2: its hash is another", "coordinator audit-log verify home"] {
        assert!(warned.contains(expected), "{expected:?} is missing from: {warned}");
    }
    desk.check_fails("audit-log verify home", &["failed to believe home/audit.jsonl", "line 2", "its hash is another"]);
    desk.check_fails("renew-ca home --root-key new.invite", &["failed to use new.invite", "--root-key"]);
}

#[test]
fn a_device_is_invited_once_unless_its_invitation_is_replaced() {
    let desk = Desk::new();
    desk.check_works("invite home press-1");
    let cases: [(&str, &[&str]); 7] = [
        ("invite home press-1 --replace --out home/issuing.key", &["home/issuing.key: no invitation", "--out"]),
        ("invite home mill-1 --replace --out press-1.invite", &["press-1.invite: an invitation for press-1", "--out"]),
        ("invite home press-1", &["press-1.invite: already there", "--out", "--replace"]),
        ("invite home press-1 --out other", &["failed to invite press-1", "--replace makes a new one"]),
        (
            "invite home press-2 --out none/press-2.invite",
            &["none/press-2.invite: its directory is not there", "--out"],
        ),
        ("invite home press --count 0", &["0 is not in 1..", "--count"]),
        ("invite home press-1 --count two", &["invalid value 'two'", "--count"]),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
    assert!(!desk.path("none").exists());
    desk.check_works("invite home press-1 --replace");
    desk.check_works("invite home lathe --count 2 --out invites/of-lathes");
    assert!(desk.path("invites/of-lathes/lathe-2.invite").exists());
}

#[test]
fn what_cannot_be_read_on_the_command_line_is_a_mistake_of_usage() {
    let desk = Desk::new();
    for (arguments, expected) in [
        (&["invite", "home", ""][..], &["\"\" is not a name", "<NAME>"][..]),
        (&["invite", "home", "../press"], &["\"../press\" is not a name", "ASCII letters"]),
        (&["revoke", "home", "a b"], &["\"a b\" is not a name", "<NAME>"]),
        (&["init", "new", "--address", "foo"], &["\"foo\" is not host:port", "--address"]),
        (&["invite", "home", "press", "--count", "-1"], &["-1 is not in 1..", "--count"]),
        (&["export", "runs/smoke", "--budget", "-5%", "--out", "out"], &["invalid value '-5%'", "--budget"]),
        (&["export", "runs/smoke", "--format", "hf", "--round", "-1", "--out", "x"], &["-1 is not in 0..", "--round"]),
        (&["export", "runs/smoke", "--format", "hf", "--limit-kl", "-1", "--out", "out"], &["--limit-kl", "0 or more"]),
        (&["bench", "body", "--threads", "-1"], &["-1 is not in 0..", "--threads"]),
        (&["bench", "body", "--rank", "-1"], &["--rank", "give a rank of 1 to 1024"]),
    ] {
        let output = desk.command("").args(arguments).output().unwrap();
        check_failure(&output, &arguments.join(" "), expected);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    assert!(!desk.path("new").exists() && !desk.path("out").exists());
}

#[test]
fn an_experiment_that_cannot_be_accepted_is_named_with_its_key() {
    let desk = Desk::new();
    desk.edit("key.toml", "rank = 4", "rang = 4");
    desk.edit("split.toml", "head_blocks = 1", "head_blocks = 3");
    desk.edit("quorum.toml", "quorum = 2", "quorum = 3");
    desk.edit("strategy.toml", "\"fedavg\"", "\"fedfoo\"");
    desk.edit("digest.toml", "[model.random]", &format!("[model]\nsha256 = \"{}\"\n[model.random]", "ab".repeat(32)));
    let text = SMOKE.split("[model.random]").next().unwrap().to_owned() + "[model]\npath = \"nowhere\"\n";
    desk.write("path.toml", text + "[split]" + SMOKE.split("[split]").nth(1).unwrap());
    // The same name as the run that is there.
    desk.edit("other.toml", "rank = 4", "rank = 8");
    let cases: [(&str, &[&str]); 8] = [
        ("missing", &["missing.toml", "check the path"]),
        ("key", &["key.toml", "line 19", "unknown field `rang`", "`rank`"]),
        ("split", &["split.toml", "split.head_blocks + split.tail_blocks is 4", "less than"]),
        ("quorum", &["quorum.toml", "federation.quorum is 3", "federation.cohort = 2"]),
        ("strategy", &["strategy.toml", "line 46", "unknown variant `fedfoo`", "`fedprox`"]),
        ("digest", &["`model.sha256` is abab", "correct it, or bring that model"]),
        ("path", &["nowhere", "check the path"]),
        ("other", &["runs/smoke", "another experiment", "`rank = 4` there, `rank = 8` here", "another name"]),
    ];
    for (name, expected) in cases {
        desk.check_fails(&format!("run {name}.toml --home home"), expected);
    }
}

#[test]
fn a_run_that_cannot_begin_says_what_is_in_its_way() {
    let desk = Desk::new();
    desk.write("file", "");
    desk.save_adapter("narrow", &SMOKE.replace("width = 64", "width = 32"));
    let cases: [(&str, &[&str]); 3] = [
        ("--runs file", &["file/smoke/rounds", "move it away"]),
        ("--runs new --init-adapter nowhere", &["nowhere/adapter_config.json", "check the path"]),
        (
            "--runs new --init-adapter narrow",
            &["narrow/adapter_model.safetensors", "has shape [4, 32]; expected [4, 64]"],
        ),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(&format!("run smoke.toml --home home {arguments}"), expected);
    }
    let taken = UdpSocket::bind(&desk.address).unwrap();
    desk.check_fails("run smoke.toml --home home", &["cannot bind", &desk.address, "choose another"]);
    drop(taken);
    // Another process that writes the run's metrics.
    let _writer = RunDirectory::create(&desk.path("busy"), &smoke(SMOKE)).unwrap().metrics_log().unwrap();
    let expected = ["busy/smoke/metrics.jsonl", "another process", "stop that one"];
    desk.check_fails("run smoke.toml --home home --runs busy", &expected);
    // A run on a model that is no more there.
    let row = Row::Run {
        time_unix_ms: 1,
        experiment_digest: "ab".into(),
        model_digest: "cd".into(),
        software: "headwater".into(),
        energy_j: None,
    };
    let mut metrics = RunDirectory::create(&desk.path("moved"), &smoke(SMOKE)).unwrap().metrics_log().unwrap();
    metrics.append(&row).unwrap();
    let (participant, reason) = ("press-1".into(), None);
    let row = Row::Update { round: 1, attempt: 1, participant, tokens: 9, accepted: true, reason, energy_j: None };
    metrics.append(&row).unwrap();
    drop(metrics);
    desk.check_fails("run smoke.toml --home home --runs moved", &["trained on one of cd", "another name"]);
}

#[test]
fn what_no_run_holds_is_not_shown_and_not_exported() {
    let desk = Desk::new();
    RunDirectory::create(&desk.path("begun"), &smoke(SMOKE)).unwrap();
    desk.check_works("export runs/smoke --format peft,gguf:q8_0 --out exports");
    fs::create_dir_all(desk.path("runs/damaged/rounds")).unwrap();
    desk.write("runs/damaged/experiment.toml", SMOKE);
    desk.write("runs/damaged/status.json", "{\"state\": \"tra");
    let cases: [(&str, &[&str]); 18] = [
        ("status home", &["look at a run in home", "it has no rounds", "runs/NAME"]),
        ("report home", &["look at a run in home", "runs/NAME"]),
        ("export home --format hf --out out", &["look at a run in home", "runs/NAME"]),
        (
            "export runs/smoke --format gguf:q4_0 --imatrix federated --out out",
            &["runs/smoke/imatrix holds none", "participant calibrate"],
        ),
        (
            "export runs/smoke --format gguf:q4_0 --imatrix federated,mine.gguf --out out",
            &["`federated` beside other importance matrices", "runs/smoke/imatrix", "name every file"],
        ),
        (
            "export runs/smoke --format gguf:q4_0 --calibrate none.txt --out out",
            &["failed to read none.txt", "check the path"],
        ),
        ("status .", &["look at a run in .: it has no experiment.toml, so it is no run directory", "runs/NAME"]),
        ("status runs/none", &["look at a run in runs/none", "no run directory", "check the path"]),
        ("status runs/damaged", &["runs/damaged/status.json", "it is damaged", "`coordinator run`"]),
        ("report runs/none", &["look at a run in runs/none", "no run directory", "check the path"]),
        ("report runs/smoke --out none/page.html", &["none/page.html", "its directory is not there; make it"]),
        ("report runs/smoke --out runs/smoke/metrics.jsonl", &["runs/smoke/metrics.jsonl lies in the run", "--out"]),
        ("export runs/none --format hf --out out", &["look at a run in runs/none", "check the path"]),
        (
            "export begun/smoke --format hf --out out",
            &["begun/smoke", "no round has finished", "let the run finish one"],
        ),
        ("export runs/smoke --format hf --out out --round 2", &["round 2", "the finished rounds are 1 to 1"]),
        ("export runs/smoke --format onnx --out out", &["'onnx'", "hf, peft, gguf:f32"]),
        ("export runs/smoke --format gguf:q4_k --out out", &["'gguf:q4_k'", "gguf:q4_0"]),
        ("export runs/smoke --format hf,peft --out exports", &["exports/peft/", "already there", "--force"]),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
    assert!(!desk.path("out").exists() && !desk.path("exports/hf").exists());
    assert!(!desk.path("home/report.html").exists() && desk.path("begun/smoke/imatrix").is_dir());
}

#[test]
fn what_cannot_be_quantized_as_asked_is_named() {
    let desk = Desk::new();
    desk.check_works("export runs/smoke --format gguf:q8_0 --out exports");
    desk.write("short.txt", "too short");
    let model = "quantize exports/model-q8_0.gguf --out out";
    let cases: [(&str, &[&str]); 15] = [
        (&format!("{model} --format gguf:q8_0 --calibrate short.txt"), &["use --calibrate", "leave it out"]),
        (&format!("{model} --format hf --imatrix none.gguf"), &["use --imatrix", "leave it out"]),
        (
            "export runs/smoke --format peft --limit-kl 1 --out out",
            &["use --limit-kl", "value by value", "leave it out"],
        ),
        (
            "quantize exports/model-q8_0.gguf --format gguf:q8_0 --out exports --force",
            &["exports/model-q8_0.gguf", "which is read", "--out"],
        ),
        (&format!("{model} --format gguf:q4_0 --check-text none.txt"), &["none.txt", "check the path"]),
        ("quantize none --format gguf:q4_0 --out out", &["none", "check the path"]),
        (&format!("{model} --format peft"), &["has no adapter"]),
        (&format!("{model} --format gguf:f16 --adapter none"), &["none/adapter_config.json", "check the path"]),
        (&format!("{model} --budget 60"), &["'60'", "60MB"]),
        (&format!("{model} --budget 10KB"), &["10000 bytes", "allow that much"]),
        (&format!("{model} --format gguf:q4_0 --calibrate none.txt"), &["none.txt", "check the path"]),
        (&format!("{model} --format gguf:q4_0 --calibrate short.txt"), &["short.txt", "fewer than 16 tokens"]),
        (&format!("{model} --format gguf:q4_0 --imatrix exports/model-q8_0.gguf"), &["model-q8_0.gguf", "importance"]),
        (
            &format!("{model} --format gguf:q4_0 --imatrix federated"),
            &["`federated`", "exports/model-q8_0.gguf is no run", "name the files"],
        ),
        (&format!("{model} --format gguf:q4_0 --imatrix none.gguf"), &["none.gguf"]),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
    assert!(!desk.path("out").exists());
    for nats in ["nan", "inf", "x"] {
        desk.check_fails(&format!("{model} --format gguf:q4_0 --limit-kl {nats}"), &["--limit-kl", "0 or more"]);
    }
    let lossy = format!("{model} --format gguf:q4_0 --limit-kl 0.000000001");
    desk.check_fails(&lossy, &["out/model-q4_0.gguf", "beyond the limit", "--limit-kl"]);
    desk.check_works("quantize exports/model-q8_0.gguf --format gguf:q4_0 --budget 60% --out kept");
    assert!(desk.path("kept/model-q4_0.gguf").exists() && desk.path("kept/model-budget.gguf").exists());
}

#[test]
fn a_step_that_cannot_be_measured_is_a_mistake_of_usage() {
    let desk = Desk::new();
    for (option, expected) in [
        ("--batch 4x0", "give SEQUENCESxTOKENS, such as 4x128"),
        ("--lora q_prj", "no layer is called `q_prj`"),
        ("--rank 0", "give a rank of 1 to 1024"),
        ("--steps 0", "0 is not in 1.."),
    ] {
        let arguments = format!("bench body {option}");
        let output = desk.command(&arguments).output().unwrap();
        check_failure(&output, &arguments, &[expected]);
        assert_eq!(output.status.code(), Some(2), "{arguments}");
    }
}

#[test]
fn an_unknown_model_lists_the_catalogue() {
    let expected = ["the model \"gpt-5\"", "the catalogue has", "smollm2-135m-instruct", "Apache-2.0"];
    Desk::new().check_fails("fetch gpt-5", &expected);
}

#[test]
fn output_that_cannot_be_written_is_an_error_and_no_panic() {
    let desk = Desk::new();
    let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let mut command = desk.command("report runs/smoke --json");
    check_failure(&command.stdout(full).output().unwrap(), "report > /dev/full", &["failed to print", "No space left"]);
}

#[test]
fn who_has_read_enough_of_the_output_is_told_no_error() {
    let desk = Desk::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = desk.command("report runs/smoke").stdout(writer).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn every_command_has_help_with_an_example() {
    let desk = Desk::new();
    let help = desk.check_works("--help");
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 7, "{help}");
    for command in commands.into_iter().filter(|command| *command != "help") {
        let help = desk.check_works(&format!("{command} --help"));
        assert!(help.contains("Example") && help.contains(&format!("coordinator {command} ")), "{help}");
    }
}

/// A directory with `smoke.toml`, a home, and in `runs/smoke` a run of it whose first round is finished.
struct Desk {
    directory: TempDir,
    address: String,
}

impl Desk {
    fn new() -> Self {
        let address = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let desk = Self { directory: tempfile::tempdir().unwrap(), address };
        desk.write("smoke.toml", SMOKE);
        desk.check_works(&format!("init home --address {}", desk.address));
        let run = RunDirectory::create(&desk.path("runs"), &smoke(SMOKE)).unwrap();
        let round = run.begin_round(1).unwrap();
        desk.save_adapter(round.join("adapter").to_str().unwrap(), SMOKE);
        run.finish_round(1).unwrap();
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// The smoke experiment with one thing changed.
    fn edit(&self, name: &str, from: &str, to: &str) {
        assert!(SMOKE.contains(from), "{from}");
        self.write(name, SMOKE.replacen(from, to, 1));
    }

    fn save_adapter(&self, name: &str, experiment: &str) {
        let experiment = smoke(experiment);
        let source = model::source::of_experiment(&experiment).unwrap();
        let config = AdapterConfig::new(&experiment.adapter);
        let adapter = Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(1)).unwrap();
        adapter.save(&self.path(name), "base").unwrap();
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_coordinator")));
        command.args(arguments.split_whitespace()).current_dir(self.directory.path()).stdin(Stdio::null());
        command.env_remove("RUST_LOG");
        command
    }

    fn check_works(&self, arguments: &str) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "coordinator {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn check_fails(&self, arguments: &str, expected: &[&str]) {
        check_failure(&self.command(arguments).output().unwrap(), arguments, expected);
    }
}

fn check_failure(output: &Output, arguments: &str, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let told = format!("coordinator {arguments}\nexit code {:?}\n{stderr}", output.status.code());
    assert!(output.status.code().is_some_and(|code| code != 0), "{told}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{told}");
    // A wrong line of TOML, the catalogue and a command's usage are shown below the message.
    let shown = ["TOML parse error", "the catalogue has", "--help"].iter().any(|text| stderr.contains(text));
    assert!(stderr.trim_end().lines().count() == 1 || shown, "{told}");
    for expected in expected {
        assert!(stderr.contains(expected), "{expected:?} is missing from: {told}");
    }
}

fn smoke(text: &str) -> Experiment {
    Experiment::from_toml(text, "smoke.toml").unwrap()
}
