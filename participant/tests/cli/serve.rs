//! `participant serve` over raw sockets: what programs ask, and what nobody should.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Desk, SMOKE, chained};

/// A server of the desk's model as `base`, with the adapters `one` and `two`.
struct Served {
    process: Child,
    address: SocketAddr,
    _desk: Desk,
}

impl Served {
    fn start(options: &str) -> Self {
        let desk = Desk::new();
        desk.weights("base.gguf");
        desk.save_adapter("one", SMOKE);
        desk.save_adapter("two", SMOKE);
        let arguments =
            format!("serve --model base.gguf --adapter one --adapter two --bind 127.0.0.1:0 --json {options}");
        let mut command = desk.command(&arguments);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(told["models"], json!(["base", "one", "two"]));
        let address = told["address"].as_str().unwrap().parse().unwrap();
        Self { process, address, _desk: desk }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        // Far beyond every limit of the server's: a test that hangs ends.
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// The whole response to some bytes, after which nothing more is sent.
    fn raw(&self, bytes: &[u8]) -> Response {
        let mut stream = self.connect();
        // The server may have answered and closed before all is written.
        let _ = stream.write_all(bytes);
        Response::read(stream)
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        self.raw(request(path, &body.to_string()).as_bytes())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn request(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

struct Response {
    status: u16,
    head: String,
    body: String,
}

impl Response {
    /// Until the server closes; a status of 0 is a connection that was closed without an answer.
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        // A reset is an end as well.
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let body = match head.to_lowercase().contains("transfer-encoding: chunked") {
            true => unchunked(body),
            false => body.to_owned(),
        };
        Self { status, head: head.to_lowercase(), body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {} {}", self.head, self.body))
    }

    /// The pieces of a stream, which ends as it should.
    fn pieces(&self) -> Vec<Value> {
        assert!(self.head.contains("text/event-stream"), "{} {}", self.head, self.body);
        let mut events: Vec<&str> = self.body.split_terminator("\n\n").collect();
        assert_eq!(events.pop(), Some("data: [DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }
}

fn unchunked(mut chunks: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = chunks.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        text.push_str(&rest[..size]);
        chunks = rest[size..].strip_prefix("\r\n").unwrap();
    }
    text
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[test]
fn models_answer_whole_and_piece_by_piece() {
    let served = Served::start("");
    let models = served.raw(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").json();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "one", "two"]);

    for model in names {
        let mut body = json!({"model": model, "prompt": "press", "max_tokens": 12, "seed": 7});
        let whole = served.post(TEXT, &body).json();
        assert_eq!((&whole["object"], &whole["model"]), (&json!("text_completion"), &json!(model)));
        assert_eq!(whole["choices"][0]["finish_reason"], "length");
        assert_eq!(whole["usage"]["completion_tokens"], 12);
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let pieces = served.post(TEXT, &body).pieces();
        let text: String = pieces.iter().filter_map(|piece| piece["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, whole["choices"][0]["text"]);
        let usage = &pieces.last().unwrap()["usage"];
        assert_eq!(usage["total_tokens"], whole["usage"]["total_tokens"]);
        // The same prompt, but for its last token.
        let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
        assert_eq!((cached(&whole["usage"]), cached(usage)), (0, usage["prompt_tokens"].as_u64().unwrap() - 1));
    }

    let messages =
        json!([{"role": "system", "content": "short"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]);
    let mut body = json!({"model": "two", "messages": messages, "max_completion_tokens": 5, "temperature": 0});
    let whole = served.post(CHAT, &body).json();
    assert_eq!(
        (&whole["object"], &whole["choices"][0]["message"]["role"]),
        (&json!("chat.completion"), &json!("assistant"))
    );
    body["stream"] = json!(true);
    let pieces = served.post(CHAT, &body).pieces();
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = pieces.iter().filter_map(|piece| piece["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"]);
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn a_conversation_is_not_read_again_unless_nothing_is_kept() {
    for (options, keeps) in [("", true), ("--sequences 1 --concurrent 1", true), ("--sequences 0", false)] {
        let served = Served::start(options);
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let mut messages = vec![message("system", "short"), message("user", "what does the pump do?")];
        let mut before = 0;
        for turn in 0..3 {
            let body = json!({"model": "one", "messages": messages, "max_tokens": 8, "temperature": 0});
            let answer = served.post(CHAT, &body).json();
            let usage = &answer["usage"];
            let expected = if keeps { before } else { 0 };
            assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], expected, "turn {turn}, {options}: {usage}");
            before = usage["prompt_tokens"].as_u64().unwrap();
            messages.push(message("assistant", "it pumps"));
            messages.push(message("user", " and then?"));
        }
        // Another adapter's keys and values are others.
        let body = json!({"model": "two", "messages": messages, "max_tokens": 8});
        assert_eq!(served.post(CHAT, &body).json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    }
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let served = Served::start("");
    let text = |body: Value| request(TEXT, &body.to_string());
    let ask = |name: &str, value: Value| {
        let mut body = json!({"model": "base", "prompt": "x", "max_tokens": 1});
        body[name] = value;
        request(TEXT, &body.to_string())
    };
    let schema = |schema: Value| {
        ask("response_format", json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}))
    };
    let cases: Vec<(String, u16, &str)> = vec![
        (request(TEXT, "{\"model\":"), 400, "not JSON"),
        (request(TEXT, "[1]"), 400, "no object"),
        (request(TEXT, &"[".repeat(100_000)), 400, "not JSON"),
        (text(json!({"prompt": "x"})), 400, "`model` is missing"),
        (text(json!({"model": 5, "prompt": "x"})), 400, "`model` is not a string"),
        (text(json!({"model": "base"})), 400, "`prompt` is missing"),
        (ask("model", json!("three")), 404, "there are: base, one, two"),
        (ask("prompt", json!(["a", "b"])), 400, "`prompt` is not one string"),
        (ask("max_tokens", json!(-1)), 400, "`max_tokens` is not a whole number"),
        (ask("max_tokens", json!(1e300)), 400, "`max_tokens` is not a whole number"),
        (ask("temperature", json!("hot")), 400, "`temperature` is not a number"),
        (ask("temperature", json!(-1)), 400, "temperature is -1; give 0 or more"),
        (ask("top_p", json!(0)), 400, "top_p is 0"),
        (ask("stop", json!([1])), 400, "`stop` is not"),
        (ask("stop", json!("")), 400, "`stop` is not a string of 1 to 256 bytes"),
        (ask("stop", json!(["a", ""])), 400, "`stop` is not a string of 1 to 256 bytes"),
        (ask("stream", json!("yes")), 400, "`stream` is not true or false"),
        (ask("deadline_ms", json!(0)), 400, "deadline_ms is 0"),
        (ask("deadline_ms", json!(1e300)), 400, "deadline_ms is 1e+300; give"),
        (ask("n", json!(2)), 400, "`n` is not supported"),
        (ask("max_token", json!(2000)), 400, "`max_token` is no field of this interface; check its spelling"),
        (ask("max_token", json!(null)), 400, "`max_token` is no field"),
        (ask(&"ä".repeat(1000), json!(1)), 400, "is no field of this interface"),
        (ask("seed", json!(0.5)), 400, "`seed` is not a whole number"),
        (ask("modalities", json!(["text", "audio"])), 400, "`modalities` is not supported"),
        (ask("web_search_options", json!({})), 400, "`web_search_options` is not supported"),
        (ask("t_max_predict_ms", json!(5)), 400, "say it as `deadline_ms`"),
        (ask("lora", json!([{"id": 0, "scale": 0.5}])), 400, "name an adapter as `model`"),
        (request(TEXT, r#"{"model": "base", "prompt": "x", "temperature": 1e999}"#), 400, "number out of range"),
        (ask("json_schema", json!({})), 400, "`json_schema` is not supported; say it as `response_format`"),
        (ask("grammar", json!("root ::= \"a\"")), 400, "`grammar` is not supported; say it as `response_format`"),
        (ask("functions", json!([{"name": "x"}])), 400, "`functions` is not supported"),
        (ask("function_call", json!("auto")), 400, "`function_call` is not supported"),
        (ask("tool_choice", json!("required")), 400, "`tool_choice` is not supported"),
        (ask("mirostat", json!(2)), 400, "`mirostat` is not supported"),
        (ask("ignore_eos", json!(true)), 400, "`ignore_eos` is not supported"),
        (ask("repeat_penalty", json!(0)), 400, "repetition_penalty is 0"),
        (ask("n_predict", json!(-1)), 400, "`n_predict` is not a whole number"),
        (ask("response_format", json!({"type": "xml"})), 400, "json_object or json_schema"),
        (ask("response_format", json!({"type": "json_schema"})), 400, "has no `json_schema` with a `schema`"),
        (schema(Value::Null), 400, "has no `json_schema` with a `schema`"),
        (
            ask("response_format", json!({"type": "json_schema", "json_schema": {"schema": {"pattern": "a"}}})),
            400,
            "`pattern` is not supported",
        ),
        (ask("response_format", json!({"type": "json_object", "scheme": {}})), 400, "`scheme` is not known here"),
        (ask("response_format", json!({"type": "json_object", "schema": {"pattern": "a"}})), 400, "`pattern`"),
        (ask("response_format", json!({"type": "json_schema", "schema": {}})), 400, "`schema` is not known here"),
        (ask("response_format", json!({"type": "json_schema", "json_schema": {"rules": {}}})), 400, "`rules` is not"),
        (schema(json!({"enum": ["a"], "type": 5})), 400, "`type` is no name"),
        (schema(json!({"anyOf": vec![json!({"type": "null"}); 70]})), 400, "70 alternatives"),
        // A thread's stack must not depend on it.
        (schema(chained(2000, |next| json!({"items": next}))), 400, "within more than 128 others"),
        (schema(chained(2000, |next| json!({"allOf": [next]}))), 400, "within more than 128 others"),
        (ask("prompt", json!("x ".repeat(4000))), 400, "more than the model's context"),
        (request(CHAT, &json!({"model": "base", "messages": "hi"}).to_string()), 400, "`messages` is not a list"),
        (request(CHAT, &json!({"model": "base", "messages": [{"role": "x"}]}).to_string()), 400, "`role`"),
        (text(json!({})).replace("/v1/completions", "/v2"), 404, "/v1/models"),
        (text(json!({})).replace("POST", "PUT"), 405, "answers by POST"),
        (text(json!({})).replace("application/json", "text/plain"), 415, "application/json"),
        (text(json!({})).replace("localhost", "rebound.example"), 403, "another host"),
        (text(json!({})).replace("Host: localhost\r\n", ""), 403, "another host"),
    ];
    for (request, status, message) in cases {
        let answer = served.raw(request.as_bytes());
        let shown: String = request.chars().take(400).collect();
        assert_eq!(answer.status, status, "{shown}\n{}", answer.body);
        let told = answer.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(told.contains(message), "{shown}\n{told}");
    }
    let asks_nothing = json!({
        "model": "base", "prompt": "x", "max_tokens": 1, "n": 1, "tools": [], "functions": [], "function_call": "none",
        "grammar": "", "json_schema": null, "tool_choice": "auto", "ignore_eos": false, "mirostat": 0, "typical_p": 1.0,
        "dynatemp_range": 0, "dry_multiplier": 0.0, "xtc_probability": 0, "top_logprobs": 0, "repeat_penalty": 1.0,
        "logprobs": null, "stream_options": null, "user": "press-1", "metadata": {"a": "b"}, "store": false,
        "service_tier": "auto", "modalities": ["text"], "samplers": [], "t_max_predict_ms": -1, "cache_prompt": true,
        "chat_template_kwargs": {}, "seed": 5,
    });
    assert_eq!(served.post(TEXT, &asks_nothing).status, 200);
    let by_seed = |seed: i64| {
        let body = json!({"model": "base", "prompt": "x", "max_tokens": 30, "seed": seed});
        served.post(TEXT, &body).json()["choices"][0]["text"].clone()
    };
    assert_eq!(by_seed(-1), by_seed(-1));
    assert_ne!(by_seed(-1), by_seed(1));
    let by_llama_cpps_name = json!({"model": "base", "prompt": "x", "n_predict": 2, "temperature": 0});
    assert_eq!(served.post(TEXT, &by_llama_cpps_name).json()["usage"]["completion_tokens"], 2);
}

#[test]
fn garbage_and_sizes_beyond_all_limits_are_refused() {
    let served = Served::start("");
    let head = |length: &str| request(TEXT, "").replace("Content-Length: 0", &format!("Content-Length: {length}"));
    let cases: Vec<(Vec<u8>, &[u16])> = vec![
        (b"\0\x01\x02\xff\r\n\r\n".to_vec(), &[0, 400]),
        (b"GET\r\n\r\n".to_vec(), &[0, 400]),
        // A TLS greeting.
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n".to_vec(), &[0, 400]),
        // A gigabyte that is announced, and one that no number holds.
        (head("1073741824").into_bytes(), &[413]),
        (head("99999999999999999999999").into_bytes(), &[0, 400]),
        (head("-1").into_bytes(), &[0, 400]),
        // Who is still sending when the answer comes may lose it.
        (request(TEXT, &" ".repeat(2 << 20)).into_bytes(), &[0, 413]),
        // A header without end.
        (
            format!("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: {}", "a".repeat(1 << 20)).into_bytes(),
            &[0, 400, 431],
        ),
        (format!("GET /v1/models HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(1000)).into_bytes(), &[0, 400, 431]),
    ];
    for (bytes, statuses) in cases {
        let answer = served.raw(&bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        assert!(statuses.contains(&answer.status), "{shown}: {} {}", answer.status, answer.body);
    }
    // A chunked body without end.
    let mut stream = served.connect();
    let chunked = request(TEXT, "").replace("Content-Length: 0", "Transfer-Encoding: chunked");
    let _ = stream.write_all(chunked.as_bytes());
    let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
    // Until the server hangs up, at the latest behind a gigabyte.
    let sent = (0..1 << 14).take_while(|_| stream.write_all(chunk.as_bytes()).is_ok()).count();
    assert!(sent < 1 << 12, "{sent} chunks were taken");
    // A body that ends early.
    let mut stream = served.connect();
    stream.write_all(head("100").as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert!([0, 400].contains(&Response::read(stream).status));
    assert_eq!(served.post(TEXT, &json!({"model": "base", "prompt": "x", "max_tokens": 1})).status, 200);
}

#[test]
fn who_is_slow_is_given_up_and_keeps_nobody_waiting() {
    let served = Served::start("--patience 1s");
    let begun = |bytes: &str| {
        let mut stream = served.connect();
        stream.write_all(bytes.as_bytes()).unwrap();
        stream
    };
    let body = request(TEXT, "").replace("Content-Length: 0", "Content-Length: 100") + "{";
    let slow: Vec<TcpStream> = (0..40).flat_map(|_| [begun(""), begun("POST /v1/comp"), begun(&body)]).collect();
    assert_eq!(served.post(TEXT, &json!({"model": "base", "prompt": "x", "max_tokens": 1})).status, 200);
    for stream in slow {
        assert!([0, 400, 408].contains(&Response::read(stream).status));
    }
}

#[test]
fn who_reads_nothing_is_given_up() {
    let served = Served::start("--patience 1s");
    let mut stream = served.connect();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    let asked = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(1000);
    // The system's buffers fill, in both directions; then the server hangs up.
    let error = std::iter::repeat_with(|| stream.write_all(asked.as_bytes())).find_map(Result::err).unwrap();
    assert!(!matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    assert_eq!(served.post(TEXT, &json!({"model": "base", "prompt": "x", "max_tokens": 1})).status, 200);
}

#[test]
fn an_answer_has_the_form_that_its_request_asks_for() {
    let served = Served::start("");
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["pump", "bar"], "properties": {
        "pump": {"type": "string", "maxLength": 8}, "bar": {"type": "integer"}, "state": {"enum": ["on", "off", null]}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "status", "strict": true, "schema": schema}});
    for seed in 0..6 {
        let mut body =
            json!({"model": "base", "prompt": "status: ", "max_tokens": 400, "seed": seed, "response_format": format});
        let whole = served.post(TEXT, &body).json();
        assert_eq!(whole["choices"][0]["finish_detail"], "ended", "{whole}");
        let text = whole["choices"][0]["text"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap();
        assert!(value["bar"].is_i64() && value["pump"].as_str().unwrap().chars().count() <= 8, "{value}");
        assert!(
            value.as_object().unwrap().keys().all(|key| ["pump", "bar", "state"].contains(&key.as_str())),
            "{value}"
        );
        body["stream"] = json!(true);
        let pieces = served.post(TEXT, &body).pieces();
        let streamed: String = pieces.iter().filter_map(|piece| piece["choices"][0]["text"].as_str()).collect();
        assert_eq!(streamed, text);
        // What is cut off, by a stop string or in time, is the beginning of such an answer.
        body["stream"] = json!(false);
        body["stop"] = json!("\"bar\"");
        let stopped = served.post(TEXT, &body).json();
        assert_eq!(stopped["choices"][0]["text"], text.split("\"bar\"").next().unwrap());
        body["deadline_ms"] = json!(1);
        let hurried = served.post(TEXT, &body).json();
        assert!(text.starts_with(hurried["choices"][0]["text"].as_str().unwrap()), "{hurried}");
    }
    // As llama.cpp spells it; and two to the power of forty ways to the same string.
    for (format, is_so) in [
        (json!({"type": "json_object", "schema": {"enum": [12, 15]}}), Value::is_number as fn(&Value) -> bool),
        (
            json!({"type": "json_object", "schema": chained(40, |next| json!({"anyOf": [next, next, {"type": "null"}]}))}),
            |value| value.is_string() || value.is_null(),
        ),
    ] {
        let body = json!({"model": "base", "prompt": "x", "max_tokens": 400, "response_format": format});
        let text = served.post(TEXT, &body).json()["choices"][0]["text"].as_str().unwrap().to_owned();
        assert!(serde_json::from_str(&text).is_ok_and(|value| is_so(&value)), "{text}");
    }
    let body = json!({"model": "base", "prompt": "x", "max_tokens": 40, "response_format": {"type": "json_object"}});
    let text = served.post(TEXT, &body).json()["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.trim_start().starts_with('{'), "{text}");
}

#[test]
fn what_finds_no_place_is_refused_and_what_has_a_deadline_ends() {
    let served = Served::start("--concurrent 1 --queue 0");
    // Long, and never read: the place is taken until somebody does.
    let body = json!({"model": "base", "prompt": "x", "max_tokens": 2000, "stream": true, "seed": 1});
    let mut long = served.connect();
    long.write_all(request(TEXT, &body.to_string()).as_bytes()).unwrap();
    let mut first = [0; 15];
    long.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    let short = served.post(TEXT, &json!({"model": "base", "prompt": "x", "max_tokens": 1}));
    // The model is small: the long answer may be over.
    assert!([200, 503].contains(&short.status), "{} {}", short.status, short.body);
    assert!(short.status == 200 || short.head.contains("retry-after: 1"), "{}", short.head);
    drop(long);

    let hurried = json!({"model": "base", "prompt": "x ".repeat(1000), "max_tokens": 1000, "deadline_ms": 2});
    let answer = served.post(TEXT, &hurried);
    // The long answer's place may still be taken.
    assert!([200, 503].contains(&answer.status), "{}", answer.body);
    if answer.status == 200 {
        assert_eq!(answer.json()["choices"][0]["finish_detail"], "deadline");
    }
}

#[cfg(unix)]
#[test]
fn an_interruption_ends_it_in_good_order() {
    let mut served = Served::start("");
    // An idle connection, and one in the middle of a request.
    let _idle = served.connect();
    let mut half = served.connect();
    half.write_all(b"POST /v1/comp").unwrap();
    let id = served.process.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    assert_eq!(served.process.wait().unwrap().code(), Some(0));
}

#[cfg(unix)]
#[test]
fn answers_under_way_end_with_what_they_have() {
    let mut served = Served::start("--concurrent 16");
    // So many tokens take longer than a server that ends waits, unless the machine is a fast one.
    let format = json!({"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 2000}}});
    let body = json!({"model": "base", "prompt": "x", "max_tokens": 2000, "stream": true, "response_format": format});
    let begun = || {
        let mut stream = served.connect();
        stream.write_all(request(TEXT, &body.to_string()).as_bytes()).unwrap();
        stream
    };
    let streams: Vec<TcpStream> = (0..16).map(|_| begun()).collect();
    for stream in &streams {
        stream.peek(&mut [0]).unwrap();
    }
    let id = served.process.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let reading: Vec<_> = streams.into_iter().map(|stream| std::thread::spawn(|| Response::read(stream))).collect();
    for answer in reading {
        let pieces = answer.join().unwrap().pieces();
        assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
    }
    assert_eq!(served.process.wait().unwrap().code(), Some(0));
}
