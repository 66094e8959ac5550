//! The two programs as a user runs them: real processes, real QUIC on loopback, real files, Ctrl-C and a full disk.
//!
//! What the numbers must be is said in `oracle` and `identities`; here it counts that the programs fit together.

use std::io::{BufRead, BufReader, Read};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::world::SMOKE;

const SMOKE_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/smoke.toml");

#[test]
fn the_smoke_experiment_is_trained_reported_exported_and_asked() {
    let site = Site::new();
    site.init();
    let mut coordinator = site.start(&format!("coordinator run {SMOKE_PATH} --home home"));
    let participants = ["press-1", "mill-1"].map(|name| site.join(name));
    for participant in participants {
        participant.ends_well("completed");
    }
    coordinator.until("completed: 2 rounds");
    coordinator.ends_well("coordinator report runs/smoke");

    assert!(site.run("coordinator status runs/smoke").contains("2 of 2 rounds"));
    assert_eq!(site.json("coordinator status runs/smoke --json")["status"]["state"], "finished");
    assert!(site.run("coordinator report runs/smoke").contains("held-out loss"));
    assert!(std::fs::read_to_string(site.path("runs/smoke/report.html")).unwrap().contains("<svg"));
    let report = site.json("coordinator report runs/smoke --json");
    let [before, after] = ["before", "after"].map(|when| report["held_out"][when]["nats"].as_f64().unwrap());
    assert!(after < before, "held-out loss {before} before, {after} after");
    let participants = report["participants"].as_array().unwrap();
    assert_eq!(participants.len(), 2);
    participants.iter().for_each(|participant| check_bytes_add_up(&participant["traffic"]));

    site.run("coordinator export runs/smoke --format hf,peft,gguf:f32,gguf:f16,gguf:q8_0 --out exports");
    let [hf, f32] = ["hf", "model-f32.gguf"].map(|model| {
        let generated = site
            .json(&format!("participant generate --model exports/{model} --prompt press --raw --max-tokens 24 --json"));
        let evaluated =
            site.json(&format!("participant evaluate --model exports/{model} --data data/mill-1.jsonl --json"));
        (generated["tokens"].clone(), evaluated["loss_nats"].as_f64().unwrap())
    });
    assert_eq!(hf, f32);
    assert!(hf.1.is_finite() && hf.1 < before, "{hf:?}");
    for model in ["model-f16.gguf", "model-q8_0.gguf"] {
        site.run(&format!("participant generate --model exports/{model} --prompt press --raw --max-tokens 4"));
    }
}

#[test]
fn a_coordinator_stopped_by_ctrl_c_says_how_to_go_on_and_goes_on() {
    let site = Site::of(&longer(12));
    let mut coordinator = site.start("coordinator run experiment.toml --home home --runs kept");
    let participants = ["press-1", "mill-1"].map(|name| site.join(name));
    coordinator.until("round 2: loss");
    coordinator.signal("INT");
    let told = coordinator.ends_well("nothing finished is lost");
    for participant in participants {
        participant.ends_well("stopped after round");
    }
    let finished = site.json("coordinator status kept/smoke --json")["rounds_finished"].as_u64().unwrap();
    assert!(told.contains(&format!("stopped after round {finished} of 12")), "{told}");
    let adapter = format!("kept/smoke/rounds/{finished:04}/adapter/adapter_model.safetensors");
    let adapter_before = std::fs::read(site.path(&adapter)).unwrap();

    // What it said is what goes on, as it stands.
    let again = told.lines().find(|line| line.starts_with("  coordinator run ")).expect(&told).trim();
    let mut coordinator = site.start(again);
    let participants = ["press-1", "mill-1"].map(|name| site.join(name));
    // In the middle of the round that it was stopped in, or with the next one.
    let next = coordinator.until(&format!("round {} ", finished + 1));
    assert!(next.contains(" goes on; ") || next.contains(" starts with "), "{next}");
    for participant in participants {
        participant.ends_well("completed");
    }
    coordinator.ends_well("completed: 12 rounds");
    assert_eq!(std::fs::read(site.path(&adapter)).unwrap(), adapter_before);
    let report = site.json("coordinator report kept/smoke --json");
    assert_eq!((&report["starts"], report["rounds"].as_array().unwrap().len()), (&2.into(), 12));

    // Nothing is left to do, and nobody is waited for.
    site.start(again).ends_well("the run is completed");
}

#[test]
fn a_participant_stopped_by_ctrl_c_says_how_to_rejoin_and_rejoins() {
    let site = Site::of(&longer(12));
    let mut coordinator = site.start("coordinator run experiment.toml --home home");
    let (press, mill) = (site.join("press-1"), site.join("mill-1"));
    coordinator.until("round 1: loss");
    press.signal("INT");
    let ended = press.end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("error: interrupted") && ended.stderr.contains("to rejoin"), "{ended:?}");
    coordinator.until("press-1 departed");
    for participant in [site.join("press-1"), mill] {
        participant.ends_well("completed");
    }
    coordinator.ends_well("completed: 12 rounds");
}

#[test]
fn sigterm_stops_either_program_as_ctrl_c_does() {
    let site = Site::of(&longer(12));
    let mut coordinator = site.start("coordinator run experiment.toml --home home");
    let (press, mill) = (site.join("press-1"), site.join("mill-1"));
    coordinator.until("round 1: loss");
    press.signal("TERM");
    let ended = press.end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("error: interrupted") && ended.stderr.contains("to rejoin"), "{ended:?}");
    coordinator.until("press-1 departed");
    coordinator.signal("TERM");
    let told = coordinator.ends_well("nothing finished is lost");
    assert!(told.contains("  coordinator run experiment.toml --home home --runs runs"), "{told}");
    mill.ends_well("stopped after round");
}

#[test]
fn training_that_never_waits_is_stopped_all_the_same() {
    let site = Site::of(&longer(400));
    for signal in ["INT", "TERM"] {
        let mut training = site.start("participant train experiment.toml --data data/press-1.jsonl");
        training.until("step 0");
        training.signal(signal);
        let Ended { code, stderr, .. } = training.end();
        assert_eq!(code, Some(1), "{signal}: {stderr}");
        assert!(stderr.contains("run the same command again to start over"), "{signal}: {stderr}");
    }
}

#[test]
fn a_participant_that_was_killed_takes_its_place_back_when_it_is_started_again() {
    let site = Site::of(&longer(12));
    let mut coordinator = site.start("coordinator run experiment.toml --home home");
    let (press, mill) = (site.join("press-1"), site.join("mill-1"));
    coordinator.until("round 1: loss");
    // Nothing closes its connection: the coordinator would wait for it until QUIC's idle time is over.
    drop(press);
    let press = site.join("press-1");
    coordinator.until("press-1 departed: the same device has connected again");
    for participant in [press, mill] {
        participant.ends_well("completed");
    }
    coordinator.ends_well("completed: 12 rounds");
}

#[test]
fn a_participant_whose_identity_connects_from_elsewhere_ends_and_says_so() {
    let site = Site::of(SMOKE);
    let mut coordinator = site.start("coordinator run experiment.toml --home home");
    let first = site.join("press-1");
    coordinator.until("press-1 joined");
    let second = site.join("press-1");
    let ended = first.end();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("the same identity has connected from elsewhere"), "{ended:?}");
    for participant in [second, site.join("mill-1")] {
        participant.ends_well("completed");
    }
    coordinator.ends_well("completed: 2 rounds");
}

#[test]
fn a_swarm_is_a_cohort_from_one_process() {
    let site = Site::of(&SMOKE.replace("cohort = 2", "cohort = 4").replace("quorum = 2", "quorum = 4"));
    site.run("coordinator invite home device --count 4 --out invites");
    let coordinator = site.start("coordinator run experiment.toml --home home");
    let swarm = site.start("participant swarm experiment.toml --count 4 --data data/all.jsonl --invites invites");
    let told = swarm.ends_well("completed");
    for name in ["device-1", "device-2", "device-3", "device-4"] {
        assert!(told.contains(&format!("{name}: the run is over: completed")), "{told}");
    }
    coordinator.ends_well("completed: 2 rounds");
    let report = site.json("coordinator report runs/smoke --json");
    assert!(report["participants"].as_array().unwrap().iter().all(|participant| participant["updates_accepted"] == 2));
}

#[test]
fn a_full_disk_is_waited_for_and_the_run_goes_on_when_there_is_room() {
    let site = Site::of(&longer(200));
    let Some(disk) = SmallDisk::mount(&site.path("small")) else {
        eprintln!("skipped: only root may mount a small disk");
        return;
    };
    let mut coordinator = site.start("coordinator run experiment.toml --home home --runs small");
    let participants = ["press-1", "mill-1"].map(|name| site.join(name));
    coordinator.until("round 2: loss");
    let told = coordinator.until("storage degraded");
    for expected in ["small/smoke/", "No space left on device"] {
        assert!(told.contains(expected), "{expected} is missing: {told}");
    }
    assert_eq!(site.json("coordinator status small/smoke --json")["status"]["state"], "storage degraded");
    disk.grow();
    coordinator.until("the storage is good again");
    coordinator.until(": loss ");
    coordinator.signal("INT");
    coordinator.ends_well("nothing finished is lost");
    for participant in participants {
        participant.ends_well("stopped after round");
    }
    let exported = site.run("coordinator export small/smoke --format peft,gguf:f16 --out exports");
    assert!(exported.contains("exports/peft"), "{exported}");
}

#[test]
fn whoever_is_killed_goes_on_and_the_result_is_that_of_a_calm_run() {
    let last = "runs/smoke/rounds/0012/adapter/adapter_model.safetensors";
    let calm = Site::of(&longer(12));
    let coordinator = calm.start("coordinator run experiment.toml --home home");
    let participants = ["press-1", "mill-1"].map(|name| calm.join(name));
    participants.into_iter().for_each(|participant| drop(participant.ends_well("completed")));
    coordinator.ends_well("completed: 12 rounds");

    let site = Site::of(&longer(12));
    let mut coordinator = site.start("coordinator run experiment.toml --home home");
    let (mut press, mill) = (site.join("press-1"), site.join("mill-1"));
    for round in [1, 3, 5, 7] {
        coordinator.until(&format!("round {round}: loss"));
        // Dropped, a process is killed.
        if round % 4 == 1 {
            coordinator = {
                drop(coordinator);
                site.start("coordinator run experiment.toml --home home")
            };
        } else {
            press = {
                drop(press);
                site.join("press-1")
            };
        }
    }
    for participant in [press, mill] {
        participant.ends_well("completed");
    }
    coordinator.ends_well("completed: 12 rounds");
    let [calm, killed] = [&calm, &site].map(|site| std::fs::read(site.path(last)).unwrap());
    assert!(calm == killed, "the final adapters differ");
}

fn longer(rounds: u32) -> String {
    SMOKE.replace("rounds = 2", &format!("rounds = {rounds}"))
}

/// Messages and overhead together are what QUIC says it has sent, to 1 %.
fn check_bytes_add_up(traffic: &Value) {
    let bytes = |what: &str| -> f64 {
        ["up_bytes", "down_bytes"].map(|direction| traffic[what][direction].as_f64().unwrap()).iter().sum()
    };
    let (ledger, udp) = (bytes("messages") + bytes("overhead"), bytes("udp"));
    assert!(udp > 1e5 && (ledger - udp).abs() <= 0.01 * udp, "the ledger has {ledger} bytes, QUIC {udp}");
}

/// A directory of its own to run commands in, with the device log's records in `data/`.
struct Site {
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let site = Self { directory: tempfile::tempdir().unwrap() };
        site.run("participant device-log --out data --records 40");
        site
    }

    /// Ready for `coordinator run experiment.toml --home home`.
    fn of(experiment: &str) -> Self {
        let site = Self::new();
        std::fs::write(site.path("experiment.toml"), experiment).unwrap();
        site.init();
        site
    }

    /// A home on a free port, and invitations for two devices.
    fn init(&self) {
        let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        self.run(&format!("coordinator init home --address 127.0.0.1:{port}"));
        for name in ["press-1", "mill-1"] {
            self.run(&format!("coordinator invite home {name}"));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn join(&self, name: &str) -> Process {
        self.start(&format!("participant join {name}.invite --data data/{name}.jsonl"))
    }

    fn start(&self, command: &str) -> Process {
        let mut words = command.split_whitespace();
        let coordinator = Path::new(env!("CARGO_BIN_EXE_coordinator"));
        // The other program lies beside it wherever the workspace's tests are built.
        let program = coordinator.with_file_name(words.next().unwrap());
        let mut child = Command::new(&program)
            .args(words)
            .current_dir(self.directory.path())
            .env("HEADWATER_CACHE", self.path("cache"))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; build the whole workspace", program.display()));
        let (stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (tell, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Nobody reads the lines of a process that was killed.
                let _ = tell.send(line);
            }
        });
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Process { child, command: command.into(), lines, printed: String::new(), stderr: Some(stderr) }
    }

    /// What the command prints, which must succeed.
    fn run(&self, command: &str) -> String {
        self.start(command).ends_well("")
    }

    fn json(&self, command: &str) -> Value {
        let printed = self.run(command);
        serde_json::from_str(&printed).unwrap_or_else(|error| panic!("`{command}` printed {printed:?}: {error}"))
    }
}

/// A running program; it does not outlive its test.
struct Process {
    child: Child,
    command: String,
    lines: Receiver<String>,
    printed: String,
    stderr: Option<JoinHandle<String>>,
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Process {
    /// Waits for a line that contains `text`.
    fn until(&mut self, text: &str) -> String {
        while let Some(line) = self.next_line() {
            if line.contains(text) {
                return line;
            }
        }
        panic!("`{}` ended without printing {text:?}; it printed:\n{}", self.command, self.printed);
    }

    /// None when the program has closed its output.
    fn next_line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(Duration::from_secs(60)) {
            Ok(line) => {
                self.printed += &format!("{line}\n");
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                panic!("`{}` has printed nothing for a minute; before that:\n{}", self.command, self.printed)
            }
        }
    }

    /// `INT` is what a terminal sends at Ctrl-C, `TERM` what a service manager sends.
    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success(), "{kill}");
    }

    fn end(mut self) -> Ended {
        while self.next_line().is_some() {}
        let code = self.child.wait().unwrap().code();
        let stderr = self.stderr.take().map(|stderr| stderr.join().unwrap()).unwrap_or_default();
        Ended { code, stdout: std::mem::take(&mut self.printed), stderr }
    }

    /// All that was printed by the end, which must be a success and contain `text`.
    fn ends_well(self, text: &str) -> String {
        let command = self.command.clone();
        let ended = self.end();
        assert!(ended.code == Some(0) && ended.stdout.contains(text), "`{command}`, expecting {text:?}: {ended:#?}");
        ended.stdout
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail where it has ended, which is the usual case.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file system of 1 MiB.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(path: &Path) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "headwater"]).arg(path).output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Self { path: path.to_owned() })
    }
}

impl SmallDisk {
    fn grow(&self) {
        let mount = Command::new("mount").args(["-o", "remount,size=64m"]).arg(&self.path).status();
        assert!(mount.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily, because a process of a failed test may still write to it.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
