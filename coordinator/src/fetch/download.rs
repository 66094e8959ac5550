//! One resumable HTTP download of a file whose length and digest are known beforehand.
//!
//! This module decides when to resume, when to start over and when to give up; time passes only through the `pause`
//! it is given. It trusts no answer of the server: more bytes than expected are not written, and the digest decides.

use std::env;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};
use ureq::{Agent, Body};

use super::{FetchError, PARTIAL, copy_hashed};

/// What is expected, and the open file that grows up to it; bytes that lie in it already are not fetched again.
pub(super) struct Download<'a> {
    pub bytes: u64,
    pub sha256: &'static str,
    pub to: &'a mut File,
}

impl Download<'_> {
    /// Fetches until the file is complete, resuming after each setback, and checks it.
    pub(super) fn run(&mut self, agent: &Agent, address: &str, pause: &dyn Fn(Duration)) -> Result<(), FetchError> {
        let mut have = self.to.seek(SeekFrom::End(0)).map_err(disk)?;
        if have > self.bytes {
            have = self.start_over().map_err(disk)?;
        }
        let mut progress = Progress::start(self.bytes, have);
        let mut failures = 0;
        while have < self.bytes {
            let before = have;
            let reason = match self.attempt(agent, address, &mut have, &mut progress) {
                Ok(()) => continue,
                Err(Setback::Passing(reason)) => without_address(reason, address),
                Err(Setback::Lasting(reason)) => {
                    return Err(FetchError::Unreachable { reason: without_address(reason, address) });
                }
                Err(Setback::Disk(source)) => return Err(disk(source)),
            };
            failures = if have.saturating_sub(before) >= HEADWAY_BYTES_MIN { 0 } else { failures + 1 };
            if failures == FAILURES_MAX {
                return Err(FetchError::Unreachable { reason });
            }
            progress.tell(&format!("the download stopped after {have} bytes ({reason}); resuming"));
            pause(PAUSE_MIN * 2u32.pow(failures));
        }
        progress.finish();
        self.check()
    }

    /// One request, from where the file ends to wherever the connection does.
    fn attempt(
        &mut self,
        agent: &Agent,
        address: &str,
        have: &mut u64,
        progress: &mut Progress,
    ) -> Result<(), Setback> {
        // Compressed on the way, the bytes would not be the ones that Range counts.
        let mut request = agent.get(address).header(header::ACCEPT_ENCODING, "identity");
        if *have > 0 {
            request = request.header(header::RANGE, format!("bytes={have}-"));
        }
        let response = request.call()?;
        match self.judge(&response, *have)? {
            Start::Resume => {}
            Start::Beginning => *have = self.start_over()?,
            Start::Nowhere(reason) => {
                *have = self.start_over()?;
                return Err(Setback::Passing(reason));
            }
        }
        let mut body = response.into_body().into_reader().take(self.bytes - *have);
        let mut buffer = vec![0; 1 << 16];
        while *have < self.bytes {
            let read = match body.read(&mut buffer) {
                Ok(0) => return Err(Setback::Passing("the connection ended early".to_owned())),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Setback::Passing(error.to_string())),
            };
            self.to.write_all(&buffer[..read])?;
            *have += read as u64;
            progress.advance(*have);
        }
        Ok(())
    }

    /// What the server's status and lengths say about the body that follows.
    fn judge(&self, response: &Response<Body>, have: u64) -> Result<Start, Setback> {
        let other_length =
            |found: u64| Setback::Lasting(format!("the server has a file of {found} bytes, expected {}", self.bytes));
        match response.status() {
            StatusCode::OK => match response.body().content_length() {
                Some(found) if found != self.bytes => Err(other_length(found)),
                _ => Ok(Start::Beginning),
            },
            StatusCode::PARTIAL_CONTENT => match content_range(response) {
                Some((_, Some(length))) if length != self.bytes => Err(other_length(length)),
                Some((first, _)) if first == have && have > 0 => Ok(Start::Resume),
                _ => Ok(Start::Nowhere("the server answered with another part of the file".to_owned())),
            },
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(Start::Nowhere("the server refuses to resume".to_owned())),
            status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS) => {
                Err(Setback::Passing(format!("the server answered {status}")))
            }
            status if status.is_server_error() => Err(Setback::Passing(format!("the server answered {status}"))),
            status => Err(Setback::Lasting(format!("the server answered {status}"))),
        }
    }

    fn start_over(&mut self) -> io::Result<u64> {
        self.to.set_len(0)?;
        self.to.seek(SeekFrom::Start(0))
    }

    /// A file with another digest is emptied: resuming it could not make it right.
    fn check(&mut self) -> Result<(), FetchError> {
        self.to.seek(SeekFrom::Start(0)).map_err(disk)?;
        let found = copy_hashed(self.to, &mut io::sink(), self.bytes).map_err(disk)?;
        if found.matches(self.bytes, self.sha256) {
            return Ok(());
        }
        self.start_over().map_err(disk)?;
        Err(FetchError::WrongDownload { expected: self.sha256, found: found.to_string() })
    }
}

/// An attempt that brought at least this much counts as headway, however it ended.
const HEADWAY_BYTES_MIN: u64 = 1 << 16;
/// Attempts in a row without headway after which the direct download is given up.
const FAILURES_MAX: u32 = 5;
/// The pause after an attempt; it doubles with every failure in a row.
const PAUSE_MIN: Duration = Duration::from_millis(500);

/// Where in the file the body of an answer begins.
enum Start {
    /// Where our file ends.
    Resume,
    /// At the first byte: the server ignored the range, or none was asked for.
    Beginning,
    /// At a place of no use.
    Nowhere(String),
}

/// Why an attempt ended before the file was complete.
enum Setback {
    /// Another attempt may succeed.
    Passing(String),
    /// Every further attempt would end the same way.
    Lasting(String),
    Disk(io::Error),
}

impl From<ureq::Error> for Setback {
    fn from(error: ureq::Error) -> Self {
        match &error {
            // A failed TLS handshake comes as invalid data.
            ureq::Error::Io(io) if io.kind() == io::ErrorKind::InvalidData => Self::Lasting(error.to_string()),
            ureq::Error::Io(_) | ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed => {
                Self::Passing(error.to_string())
            }
            _ => Self::Lasting(error.to_string()),
        }
    }
}

impl From<io::Error> for Setback {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

fn disk(source: io::Error) -> FetchError {
    FetchError::io("write", PARTIAL.as_ref(), source)
}

/// The first byte's position and, where given, the whole length: `bytes 500-999/1000` is `(500, Some(1000))`.
fn content_range(response: &Response<Body>) -> Option<(u64, Option<u64>)> {
    let text = response.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, length) = text.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-')?.0.parse().ok()?;
    Some((first, length.parse().ok()))
}

/// An error's text without the address, which may carry a secret, and without its host.
fn without_address(text: String, address: &str) -> String {
    let authority = address.split('/').nth(2).unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default().split(':').next().unwrap_or_default();
    let text = text.replace(address, "the address");
    if host.is_empty() { text } else { text.replace(authority, "the server").replace(host, "the server") }
}

/// An agent that trusts what this machine trusts: the bundle that pip is told to use, or else the system's
/// (`SSL_CERT_FILE` and `SSL_CERT_DIR` included). Proxies come from the environment.
pub(super) fn agent() -> Result<Agent, FetchError> {
    let root_certs = match env::var_os("PIP_CERT") {
        None => RootCerts::PlatformVerifier,
        Some(path) => {
            let unreadable = |error| FetchError::Unreachable { reason: format!("PIP_CERT is unreadable: {error}") };
            let pem = fs::read(path).map_err(unreadable)?;
            let certificates = parse_pem(&pem).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            RootCerts::from(certificates)
        }
    };
    // The workspace has rustls with ring alone; naming the provider keeps a process-wide default out of it.
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(root_certs)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build();
    let config = Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)));
    Ok(config.build().new_agent())
}

/// A bar on a terminal, one line per tenth elsewhere.
struct Progress {
    bar: ProgressBar,
    bytes: u64,
    /// Tenths that have been printed; nothing where the bar shows them.
    tenths: Option<u64>,
}

impl Progress {
    fn start(bytes: u64, have: u64) -> Self {
        let terminal = io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(bytes), target);
        let template = "{bar:32} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("the template above is well-formed"));
        bar.set_position(have);
        // The speed is that of this download, not of what lay there already.
        bar.reset_eta();
        Self { bar, bytes, tenths: (!terminal).then(|| tenths(have, bytes)) }
    }

    fn advance(&mut self, have: u64) {
        self.bar.set_position(have);
        let reached = tenths(have, self.bytes);
        if self.tenths.is_some_and(|told| told < reached) {
            self.tenths = Some(reached);
            eprintln!("{}0 %: {have} of {} bytes", reached, self.bytes);
        }
    }

    fn tell(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }

    fn finish(&self) {
        self.bar.finish();
    }
}

fn tenths(have: u64, bytes: u64) -> u64 {
    have.saturating_mul(10) / bytes.max(1)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// The first `FILE_BYTES` bytes of 0, 1, …, 250, 0, 1, …
    fn file_bytes() -> Vec<u8> {
        (0..FILE_BYTES).map(|index| (index % 251) as u8).collect()
    }

    const FILE_BYTES: u64 = 300_000;
    const FILE_SHA256: &str = "3c65ea93424a9c362fec0e3a69ea36031e8a358441479dd665cc6110eabe7b08";

    /// What the server does with one request.
    enum Answer {
        /// Sends the range asked for, but closes after this many bytes of it.
        Part {
            cut_bytes: usize,
        },
        /// Sends the file from the beginning, whatever was asked.
        Whole {
            cut_bytes: usize,
        },
        Status(&'static str),
    }

    /// Serves the answers in turn, one connection each, and returns the `Range` headers it saw.
    fn serve(answers: Vec<Answer>, body: Vec<u8>) -> (String, thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/secret-token/wheel", listener.local_addr().unwrap());
        let serving = thread::spawn(move || answers.iter().map(|answer| serve_one(&listener, answer, &body)).collect());
        (address, serving)
    }

    fn serve_one(listener: &TcpListener, answer: &Answer, body: &[u8]) -> String {
        let (mut stream, _) = listener.accept().unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let range = head.iter().find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
        let range = range.unwrap_or_default();
        let first = range.trim_end_matches('-').parse().unwrap_or(0);
        let length = body.len();
        let (status, extra, sent, cut_bytes) = match answer {
            Answer::Part { cut_bytes } if first > 0 => {
                let extra = format!("Content-Range: bytes {first}-{}/{length}\r\n", length - 1);
                ("206 Partial Content", extra, &body[first..], *cut_bytes)
            }
            Answer::Part { cut_bytes } | Answer::Whole { cut_bytes } => ("200 OK", String::new(), body, *cut_bytes),
            Answer::Status(status) => (*status, String::new(), &[][..], 0),
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{extra}Connection: close\r\n\r\n", sent.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&sent[..cut_bytes.min(sent.len())]).unwrap();
        range
    }

    struct Outcome {
        result: Result<(), FetchError>,
        file: Vec<u8>,
        ranges: Vec<String>,
        pauses_ms: Vec<u128>,
    }

    fn download(present: &[u8], answers: Vec<Answer>, body: Vec<u8>) -> Outcome {
        let (address, serving) = serve(answers, body);
        let mut to = tempfile::tempfile().unwrap();
        to.write_all(present).unwrap();
        let pauses_ms = RefCell::new(Vec::new());
        let agent = Agent::config_builder().http_status_as_error(false).proxy(None).build().new_agent();
        let result = Download { bytes: FILE_BYTES, sha256: FILE_SHA256, to: &mut to }
            .run(&agent, &address, &|pause| pauses_ms.borrow_mut().push(pause.as_millis()));
        let mut file = Vec::new();
        to.seek(SeekFrom::Start(0)).unwrap();
        to.read_to_end(&mut file).unwrap();
        Outcome { result, file, ranges: serving.join().unwrap(), pauses_ms: pauses_ms.into_inner() }
    }

    const WHOLE: usize = FILE_BYTES as usize;

    #[test]
    fn cut_download_resumes_where_it_stopped() {
        let cuts = [100_000, 50_000, WHOLE].map(|cut_bytes| Answer::Part { cut_bytes });
        let outcome = download(&[], cuts.into(), file_bytes());
        outcome.result.unwrap();
        assert_eq!(outcome.ranges, ["", "100000-", "150000-"]);
        assert!(outcome.file == file_bytes());
    }

    #[test]
    fn download_of_an_earlier_run_is_continued() {
        let outcome = download(&file_bytes()[..1234], vec![Answer::Part { cut_bytes: WHOLE }], file_bytes());
        outcome.result.unwrap();
        assert_eq!(outcome.ranges, ["1234-"]);
        assert!(outcome.file == file_bytes());
    }

    #[test]
    fn complete_file_is_checked_without_a_request() {
        let outcome = download(&file_bytes(), vec![], file_bytes());
        outcome.result.unwrap();
    }

    #[test]
    fn server_that_ignores_the_range_is_read_from_the_beginning() {
        let outcome = download(&[7; 5000], vec![Answer::Whole { cut_bytes: WHOLE }], file_bytes());
        outcome.result.unwrap();
        assert_eq!(outcome.ranges, ["5000-"]);
        assert!(outcome.file == file_bytes());
    }

    #[test]
    fn server_that_refuses_the_range_is_asked_for_the_whole() {
        let answers = vec![Answer::Status("416 Range Not Satisfiable"), Answer::Part { cut_bytes: WHOLE }];
        let outcome = download(&[7; 5000], answers, file_bytes());
        outcome.result.unwrap();
        assert_eq!(outcome.ranges, ["5000-", ""]);
    }

    #[test]
    fn wrong_digest_is_refused_and_not_kept() {
        let mut body = file_bytes();
        body[200_000] ^= 1;
        let outcome = download(&[], vec![Answer::Whole { cut_bytes: WHOLE }], body);
        assert!(matches!(outcome.result, Err(FetchError::WrongDownload { .. })));
        assert!(outcome.file.is_empty());
    }

    #[test]
    fn file_of_another_length_is_refused_before_its_body() {
        let outcome = download(&[], vec![Answer::Whole { cut_bytes: 0 }], vec![0; 7]);
        let error = outcome.result.unwrap_err().to_string();
        assert!(error.contains("a file of 7 bytes, expected 300000"), "{error}");
    }

    #[test]
    fn passing_errors_are_retried_with_growing_pauses_and_then_given_up() {
        let answers = (0..FAILURES_MAX).map(|_| Answer::Status("503 Service Unavailable")).collect();
        let outcome = download(&[], answers, file_bytes());
        assert_eq!(outcome.pauses_ms, [1000, 2000, 4000, 8000]);
        let error = outcome.result.unwrap_err().to_string();
        assert!(error.contains("503"), "{error}");
    }

    #[test]
    fn lasting_errors_are_not_retried_and_name_no_address() {
        let outcome = download(&[], vec![Answer::Status("403 Forbidden")], file_bytes());
        assert!(outcome.pauses_ms.is_empty());
        let error = outcome.result.unwrap_err().to_string();
        assert!(error.contains("403") && !error.contains("secret-token") && !error.contains("127.0.0.1"), "{error}");
    }

    #[test]
    fn errors_lose_the_address_and_the_host() {
        let address = "https://user:secret@files.test:8443/a/b.whl?token=x";
        let text = format!("bad uri {address}: not valid for files.test").to_string();
        assert_eq!(without_address(text, address), "bad uri the address: not valid for the server");
    }
}
