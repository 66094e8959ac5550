//! A sentence is planted in one device's records. Whatever crosses the network in the clear of its messages, whatever the
//! coordinator logs, measures or writes is searched for it, as text and as token ids. This proves no plain leak, and only
//! that: activations can be inverted by who knows the weights.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use net::{Connection, PeerIdentity, PeerName, StreamKind};
use participant::device_log::{Canary, FactoryDevice, generate};
use participant::session::Keep;
use tracing_subscriber::fmt::MakeWriter;
use wire::{CloseCode, FromParticipant, MessageKind};

use crate::world::World;

const CANARY: &str = "the vault code of Ms Example is quartz-7719";

/// Every way in which the sentence could lie in bytes: its text, and its token ids in the widths numbers come in. Ids of
/// the byte tokenizer are looked for without the first and last, which may have merged with their neighbours elsewhere.
fn needles(tokens: &[u32]) -> Vec<(String, Vec<u8>)> {
    let inner = &tokens[1..tokens.len() - 1];
    let spelled = |separator: &str| inner.iter().map(u32::to_string).collect::<Vec<_>>().join(separator).into_bytes();
    vec![
        ("text".into(), CANARY.as_bytes()[1..CANARY.len() - 1].to_vec()),
        ("u16 ids".into(), inner.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect()),
        ("u32 ids".into(), inner.iter().flat_map(|&id| id.to_le_bytes()).collect()),
        ("i64 ids".into(), inner.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect()),
        ("f32 ids".into(), inner.iter().flat_map(|&id| (id as f32).to_le_bytes()).collect()),
        ("ids in JSON".into(), spelled(",")),
        ("ids in a debug print".into(), spelled(", ")),
        ("ids in words".into(), spelled(" ")),
    ]
}

fn hits(haystack: &[u8], needles: &[(String, Vec<u8>)]) -> Vec<String> {
    let found = needles.iter().filter(|(_, needle)| haystack.windows(needle.len()).any(|window| window == needle));
    found.map(|(name, _)| name.clone()).collect()
}

#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Vec<u8>>>);

impl Capture {
    fn taken(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Capture {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_never_leaves_its_device() {
    let logs = Capture::default();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(logs.clone()).finish();
    // Another test of this process may have logged before; then only this thread's events are lost.
    let _ = tracing::subscriber::set_global_default(subscriber);
    // Channel sums of the same records included.
    let world = World::new(|text| text.replace("evaluate_every = 1", "evaluate_every = 1\nimatrix_tokens = 100000"));
    let tokens = world.source.tokenizer().encode(CANARY, true).unwrap();
    let needles = needles(&tokens);

    let device: FactoryDevice = "press-1".parse().unwrap();
    let canary = Canary { device, sentence: CANARY.into() };
    let lines: Vec<String> =
        generate(experiment::Seed(1), device, 40, Some(&canary)).iter().map(|record| record.json_line()).collect();
    assert!(lines.iter().any(|line| line.contains(CANARY)));

    let coordinator = world.coordinator();
    let wiretap = Capture::default();
    let (mut press, _) = world.participant_with("press-1", &lines);
    press.keep = Some(Keep { directory: world.path("state"), disk: Default::default() });
    let tap = wiretap.clone();
    let connection = coordinator
        .connect_tapped("press-1", Arc::new(move |bytes: &[u8]| tap.0.lock().unwrap().extend_from_slice(bytes)))
        .await;
    let press = tokio::spawn(async move { press.run(&connection).await });
    let mill = coordinator.join(world.participant("mill-1").0).await;
    coordinator.end().await.unwrap();
    press.await.unwrap().unwrap();
    mill.await.unwrap().1.unwrap();

    let frames = wiretap.taken();
    assert!(frames.len() > 1_000_000, "only {} bytes were tapped", frames.len());
    assert_eq!(hits(&frames, &needles), Vec::<String>::new(), "on the wire");
    let logged = logs.taken();
    assert!(!logged.is_empty(), "nothing was logged");
    assert_eq!(hits(&logged, &needles), Vec::<String>::new(), "in the logs");
    assert!(world.path("runs/smoke/imatrix/press-1.gguf").is_file());
    // What the device itself keeps of its training holds no text either.
    assert!(world.path("state").join("step.a").is_file());
    for directory in ["runs", "home", "state"] {
        check_files(&world.path(directory), &needles);
    }
}

fn check_files(directory: &Path, needles: &[(String, Vec<u8>)]) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            check_files(&path, needles);
        } else {
            assert_eq!(hits(&std::fs::read(&path).unwrap(), needles), Vec::<String>::new(), "{}", path.display());
        }
    }
}

/// The same search finds the sentence when a test sends it on purpose, as text and as ids.
#[tokio::test]
async fn a_canary_that_is_sent_on_purpose_is_found() {
    let world = World::new(str::to_owned);
    let tokens = world.source.tokenizer().encode(CANARY, true).unwrap();
    let needles = needles(&tokens);
    let wiretap = Capture::default();
    let tap = wiretap.clone();
    let peer = PeerIdentity::Participant { name: PeerName::new("press-1").unwrap() };
    let (ours, _theirs) = Connection::pair_tapped(
        peer,
        PeerIdentity::Coordinator,
        Arc::new(move |bytes: &[u8]| tap.0.lock().unwrap().extend_from_slice(bytes)),
    );
    let (mut send, _receive) = ours.open(StreamKind::Control).await.unwrap();
    send.message(&FromParticipant::Leaving { reason: CANARY.into() }).await.unwrap();
    assert_eq!(hits(&wiretap.taken(), &needles), ["text"]);
    for (name, needle) in needles.iter().skip(1) {
        send.bytes(MessageKind::Blob, needle).await.unwrap();
        assert!(hits(&wiretap.taken(), &needles).contains(name), "{name}");
    }
    ours.close(CloseCode::Done, "sent");
}
