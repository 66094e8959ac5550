//! What a user gets wrong at the command line, and what `participant` says about it: one line that names the file or the
//! key, exit code 1, and never a panic.

mod sequences;
mod serve;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use experiment::{Experiment, Seed};
use model::source::random::RandomModel;
use model::source::{gguf_metadata, gguf_tensor_name};
use model::{Adapter, AdapterConfig, ModelConfig, Source, Tokenizer};
use quant::BlockType;
use quant::gguf::Writer;
use safetensors::{Dtype, tensor::TensorView};
use tempfile::TempDir;

const SMOKE: &str = include_str!("../../../configs/smoke.toml");

#[test]
fn data_that_cannot_be_read_is_named_with_its_line() {
    let desk = Desk::new();
    desk.write("empty.jsonl", "");
    desk.write("garbled.jsonl", "{\"text\": \"a\"}\n{\"text\":\n");
    desk.write("binary.txt", b"fine\n\xff\xfe\0");
    desk.write("other-key.jsonl", "{\"txt\": \"a\"}\n");
    desk.write("other-column.csv", "a,b\n1,2\n");
    desk.write("data.parquet", "PAR1");
    let cases: [(&str, &[&str]); 8] = [
        ("missing.jsonl", &["missing.jsonl", "check the path"]),
        ("empty.jsonl", &["empty.jsonl", "holds no record", "put at least one"]),
        ("garbled.jsonl", &["garbled.jsonl, line 2", "is not JSON from column"]),
        ("binary.txt", &["binary.txt, line 2", "is not UTF-8"]),
        ("other-key.jsonl", &["other-key.jsonl, line 1", "found `txt`", "expected `text`", "[data.columns]"]),
        ("other-column.csv", &["other-column.csv, line 1", "found `a`, `b`", "expected `text`"]),
        ("data.parquet", &["data.parquet", "unknown ending", ".jsonl"]),
        ("hf", &["hf", "is a directory"]),
    ];
    for (file, expected) in cases {
        desk.check_fails(&format!("train smoke.toml --out out --data {file}"), expected);
        desk.check_fails(&format!("evaluate --model hf --data {file}"), expected);
        desk.check_fails(&format!("calibrate --model hf --out matrix.gguf --data {file}"), expected);
    }
    // Of a conversation in which only the user speaks, nothing is predicted.
    desk.weights("chat.gguf");
    desk.write("unanswered.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n");
    let expected = &["unanswered.jsonl", "no token of it is to be predicted", "conversations with an assistant"];
    desk.check_fails("evaluate --model chat.gguf --data unanswered.jsonl", expected);
    desk.check_fails("calibrate --model chat.gguf --out matrix.gguf --data unanswered.jsonl", expected);
    assert!(!desk.path("matrix.gguf").exists());
}

#[test]
fn an_importance_matrix_is_sums_alone() {
    let desk = Desk::new();
    desk.check_works("calibrate --model hf --data data.jsonl --out matrix.gguf");
    let matrix = quant::Imatrix::open(&desk.path("matrix.gguf")).unwrap();
    assert_eq!(matrix.matrices().count(), 4 * 7);
    let columns = matrix.columns("blk.0.attn_q.weight").unwrap();
    // Gains of a random model are one, and a norm makes the mean square one.
    assert!((columns.iter().sum::<f32>() / columns.len() as f32 - 1.0).abs() < 1e-2);
    let bytes = fs::read(desk.path("matrix.gguf")).unwrap();
    assert!(!bytes.windows(10).any(|window| window == b"data.jsonl"), "the data's file name left the device");
}

#[test]
fn an_experiment_that_cannot_be_accepted_is_named_with_its_key() {
    let desk = Desk::new();
    desk.edit("key.toml", "rank = 4", "rang = 4");
    desk.edit("type.toml", "rank = 4", "rank = \"four\"");
    desk.edit("split.toml", "head_blocks = 1", "head_blocks = 3");
    desk.edit("headless.toml", "head_blocks = 1", "head_blocks = 0");
    desk.edit("target.toml", "\"q_proj\"", "\"q_prj\"");
    desk.edit("digest.toml", "[model.random]", &format!("[model]\nsha256 = \"{}\"\n[model.random]", "ab".repeat(32)));
    let text = SMOKE.split("[model.random]").next().unwrap().to_owned() + "[model]\npath = \"nowhere\"\n";
    desk.write("path.toml", text + "[split]" + SMOKE.split("[split]").nth(1).unwrap());
    let cases: [(&str, &[&str]); 8] = [
        ("missing", &["missing.toml", "check the path"]),
        ("key", &["key.toml", "line 19", "unknown field `rang`", "`rank`"]),
        ("type", &["type.toml", "line 19", "expected u32"]),
        ("split", &["split.toml", "split.head_blocks + split.tail_blocks is 4", "less than"]),
        ("headless", &["headless.toml", "split.head_blocks is 0", "1 to "]),
        ("target", &["target.toml", "adapter.targets", "q_prj", "q_proj, k_proj"]),
        ("digest", &["random model", "`model.sha256` is abab", "correct it, or bring that model"]),
        ("path", &["nowhere", "check the path"]),
    ];
    for (name, expected) in cases {
        desk.check_fails(&format!("train {name}.toml --data data.jsonl --out out"), expected);
        desk.check_fails(&format!("init-adapter {name}.toml --out out"), expected);
    }
    assert!(!desk.path("out").exists());
}

#[test]
fn a_damaged_model_is_named_with_what_is_wrong() {
    let desk = Desk::new();
    desk.check_works("generate --model hf --prompt hi --raw --max-tokens 2");
    desk.write("empty.gguf", "");
    let gguf = desk.gguf();
    desk.write("cut.gguf", &gguf[..gguf.len() / 2]);
    desk.write("tensorless.gguf", &gguf);
    let weights = fs::read(desk.path("hf/model.safetensors")).unwrap();
    let damaged: [(&str, &str, Option<&[u8]>); 6] = [
        ("cut", "model.safetensors", Some(&weights[..weights.len() / 2])),
        ("header", "model.safetensors", Some(&weights[..100])),
        ("weightless", "model.safetensors", None),
        ("mute", "tokenizer.json", None),
        ("garbled", "tokenizer.json", Some(b"{")),
        ("configless", "config.json", None),
    ];
    for (name, file, bytes) in damaged {
        fs::create_dir(desk.path(name)).unwrap();
        for entry in fs::read_dir(desk.path("hf")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), desk.path(name).join(entry.file_name())).unwrap();
        }
        match bytes {
            Some(bytes) => fs::write(desk.path(name).join(file), bytes).unwrap(),
            None => fs::remove_file(desk.path(name).join(file)).unwrap(),
        }
    }
    let cases: [(&str, &[&str]); 10] = [
        ("nowhere", &["nowhere", "check the path"]),
        ("empty.gguf", &["empty.gguf", "truncated", "download it again"]),
        ("cut.gguf", &["cut.gguf", "truncated", "download it again"]),
        ("tensorless.gguf", &["tensorless.gguf", "no tensor `token_embd.weight`"]),
        ("cut", &["cut/model.safetensors", "truncated: model.", "download it again"]),
        ("header", &["header/model.safetensors", "claims a header of", "damaged"]),
        ("weightless", &["weightless/model.safetensors", "check the path"]),
        ("mute", &["mute/tokenizer.json", "check the path"]),
        ("garbled", &["garbled", "tokenizer.json"]),
        ("configless", &["configless", "holds neither config.json nor a .gguf file"]),
    ];
    for (model, expected) in cases {
        desk.check_fails(&format!("generate --model {model} --prompt hi"), expected);
        desk.check_fails(&format!("evaluate --model {model} --data data.jsonl"), expected);
    }
}

#[test]
fn a_chat_template_that_fails_is_named_with_its_file() {
    let desk = Desk::new();
    desk.write("hf/tokenizer_config.json", r#"{"chat_template": "{{ raise_exception('no turns') }}"}"#);
    let turns = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    desk.write("turns.jsonl", turns);
    let expected = ["chat template in hf/tokenizer_config.json", "no turns"];
    desk.check_fails("generate --model hf --prompt hi", &expected);
    desk.check_fails("evaluate --model hf --data turns.jsonl", &expected);
    desk.write("hf/chat_template.jinja", "{% if %}");
    let expected = ["chat template in hf/chat_template.jinja", "syntax error"];
    desk.check_fails("generate --model hf --prompt hi", &expected);
}

#[test]
fn the_integer_engine_measures_a_quantized_file_and_refuses_what_it_cannot_run() {
    let desk = Desk::new();
    desk.weights("weights.gguf");
    let measured = desk.check_works("bench infer --model weights.gguf --prompt-tokens 9 --tokens 4 --rounds 1 --json");
    let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
    for key in ["load_ms", "prompt_tokens_per_s", "decode_tokens_per_s", "bandwidth_share"] {
        assert!(measured[key].as_f64().unwrap() > 0.0, "{key}: {measured}");
    }
    let in_time = desk.check_works("bench infer --model weights.gguf --deadline 2ms --requests 20 --hogs 1 --json");
    let in_time: serde_json::Value = serde_json::from_str(&in_time).unwrap();
    assert_eq!(in_time["requests"], 20, "{in_time}");
    desk.save_adapter("adapter", SMOKE);
    let costs = desk.check_works("bench adapters --model weights.gguf --adapter adapter --count 3 --switches 9 --json");
    let costs: serde_json::Value = serde_json::from_str(&costs).unwrap();
    // Rank 4 on the queries and values of four blocks, 64 wide, in f32.
    let numbers = fs::read(desk.path("adapter/adapter_model.safetensors")).unwrap().len();
    let bytes = costs["adapter_bytes"].as_u64().unwrap() as usize;
    assert!(bytes < numbers && numbers - bytes < 8192, "{bytes} of {numbers}");
    // A directory is as good as the one file in it.
    fs::create_dir(desk.path("quantized")).unwrap();
    fs::copy(desk.path("weights.gguf"), desk.path("quantized/weights.gguf")).unwrap();
    let evaluate =
        |model: &str| desk.check_works(&format!("evaluate --model {model} --adapter adapter --data data.jsonl --json"));
    assert_eq!(evaluate("quantized"), evaluate("weights.gguf"));
    // How keys and values are kept changes their memory, and the loss hardly.
    let [f32, f16, q8_0] = ["f32", "f16", "q8_0"].map(|cache| {
        let infer = "bench infer --model weights.gguf --depth 40 --prompt-tokens 9 --tokens 4 --rounds 1 --json";
        let measured: serde_json::Value =
            serde_json::from_str(&desk.check_works(&format!("{infer} --cache {cache}"))).unwrap();
        let evaluate = format!("evaluate --model weights.gguf --cache {cache} --data data.jsonl --json");
        let loss: serde_json::Value = serde_json::from_str(&desk.check_works(&evaluate)).unwrap();
        (measured["kv_bytes"].as_u64().unwrap(), loss["loss_nats"].as_f64().unwrap())
    });
    // Heads of 16 numbers and a scale.
    assert_eq!((f32.0, 16 * q8_0.0), (2 * f16.0, 9 * f16.0));
    assert!((f16.1 - f32.1).abs() < 1e-3 && (q8_0.1 - f32.1).abs() < 1e-2, "{f32:?}, {f16:?}, {q8_0:?}");
    assert_ne!(q8_0.1, f16.1);
    desk.write("tensorless.gguf", desk.gguf());
    let cases: [(&str, &[&str]); 4] = [
        ("bench infer --model tensorless.gguf", &["tensorless.gguf", "no tensor `token_embd.weight`"]),
        ("bench infer --model nowhere.gguf", &["nowhere.gguf", "No such file"]),
        ("bench infer --model weights.gguf --tokens 9999", &["9999 tokens", "context of 2048"]),
        ("generate --model hf --prompt hi --engine integer", &["hf is no GGUF file", "use --engine float"]),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
}

#[test]
fn an_answer_s_numbers_and_ends_are_checked() {
    let desk = Desk::new();
    for (arguments, expected) in [
        ("--temperature -1", "value '-1' for '--temperature <TEMPERATURE>': give 0 or more"),
        ("--temperature nan", "value 'nan' for '--temperature <TEMPERATURE>'"),
        ("--top-p 0", "'--top-p <TOP_P>': give more than 0"),
        ("--top-p 1e300", "value '1e300' for '--top-p <TOP_P>': give"),
        ("--min-p 2", "'--min-p <MIN_P>': give 0 to 1"),
        ("--repetition-penalty 0", "'--repetition-penalty <REPETITION_PENALTY>': give more than 0"),
        ("--raw --deadline 5ms", "deadline needs the integer engine"),
    ] {
        desk.check_fails(&format!("generate --model hf --prompt hi {arguments}"), &[expected]);
    }
    let warm = "generate --model hf --prompt hi --raw --max-tokens 20 --temperature 1.5 --top-k 30 --top-p 0.9 --min-p 0.01 \
                --repetition-penalty 1.1 --json";
    let one = desk.check_works(&format!("{warm} --seed 1"));
    assert_eq!(one, desk.check_works(&format!("{warm} --seed 1")));
    assert_ne!(one, desk.check_works(&format!("{warm} --seed 2")));
    let one: serde_json::Value = serde_json::from_str(&one).unwrap();
    assert_eq!((one["tokens"].as_array().unwrap().len(), one["finish"].as_str()), (20, Some("length")));
    // A character of the answer, as a stop string.
    let text = one["text"].as_str().unwrap();
    let stop = text.chars().filter(|c| c.is_ascii_alphanumeric()).nth(2).unwrap();
    let stopped = desk.check_works(&format!("{warm} --seed 1 --stop {stop}"));
    let stopped: serde_json::Value = serde_json::from_str(&stopped).unwrap();
    assert_eq!(stopped["text"].as_str(), text.split(stop).next());
    assert_eq!(stopped["finish"], "stopped");
}

/// Embeddings are often padded to a round number of rows.
#[test]
fn rows_without_a_token_are_never_drawn() {
    let desk = Desk::new();
    let source = model::source::of_experiment(&smoke(SMOKE)).unwrap();
    let config = ModelConfig { vocabulary: 512, ..source.config().clone() };
    let padded = RandomModel::of_shape(config, Tokenizer::bytes(), Seed(1)).unwrap();
    desk.directory_of("padded", &padded);
    // Of 512 rows 253 have no token: by chance alone one of them would be drawn at once.
    desk.check_works("generate --model padded --prompt hi --raw --max-tokens 20 --temperature 100");
}

#[test]
fn an_answer_has_the_form_of_its_grammar() {
    let desk = Desk::new();
    desk.write("schema.json", r#"{"type": "array", "items": {"enum": ["on", "off"]}, "minItems": 2, "maxItems": 3}"#);
    desk.write("foreign.json", r#"{"type": "string", "format": "date"}"#);
    desk.write("broken.json", "{");
    desk.write("deep.json", chained(2000, |next| serde_json::json!({"items": next})).to_string());
    desk.write("many.json", serde_json::json!({"anyOf": vec![serde_json::json!({"type": "null"}); 70]}).to_string());
    let generate = "generate --model hf --prompt hi --raw --max-tokens 300 --json --grammar";
    for seed in 0..4 {
        let told = desk.check_works(&format!("{generate} schema.json --temperature 1 --seed {seed}"));
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let states: Vec<String> = serde_json::from_str(told["text"].as_str().unwrap()).unwrap();
        assert!((2..=3).contains(&states.len()) && states.iter().all(|state| ["on", "off"].contains(&state.as_str())));
        assert_eq!(told["finish"], "ended");
    }
    desk.check_works(&format!("{generate} json"));
    let cases: [(&str, &[&str]); 5] = [
        ("deep.json", &["deep.json", "the schema, #/$defs/a", "more than 128 others", "give a flatter one"]),
        ("many.json", &["many.json", "the schema, #: `anyOf` has 70 alternatives; 64 are the most"]),
        ("nowhere.json", &["the schema nowhere.json", "give `json` or a file"]),
        ("broken.json", &["broken.json", "it is no JSON"]),
        ("foreign.json", &["foreign.json", "the schema, #", "`format` is not supported here; leave it out"]),
    ];
    for (file, expected) in cases {
        desk.check_fails(&format!("{generate} {file}"), expected);
    }
}

/// A schema whose parts `a0`, `a1` and so on are each made of a reference to the next; the last is a string.
fn chained(count: usize, of: impl Fn(serde_json::Value) -> serde_json::Value) -> serde_json::Value {
    let part = |i: usize| (format!("a{i}"), of(serde_json::json!({"$ref": format!("#/$defs/a{}", i + 1)})));
    let mut parts: serde_json::Map<_, _> = (0..count).map(part).collect();
    parts.insert(format!("a{count}"), serde_json::json!({"type": "string"}));
    serde_json::json!({"$ref": "#/$defs/a0", "$defs": parts})
}

#[test]
fn a_server_says_that_it_listens_once_it_can_serve() {
    let desk = Desk::new();
    desk.weights("base.gguf");
    desk.save_adapter("base", SMOKE);
    let cases: [(&str, &[&str]); 2] = [
        ("serve --model hf --bind 127.0.0.1:0 --deadline 1s", &["--deadline needs the integer engine"]),
        ("serve --model base.gguf --adapter base --bind 127.0.0.1:0", &["both called `base`", "--name"]),
    ];
    for (arguments, expected) in cases {
        let output = desk.command(arguments).output().unwrap();
        check_failure(&output, arguments, expected);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "participant {arguments}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let arguments = format!("serve --model hf --bind {}", taken.local_addr().unwrap());
    desk.check_fails(&arguments, &["failed to listen on 127.0.0.1:", "in use", "; give another --bind"]);
}

#[test]
fn several_adapters_answer_one_after_the_other() {
    let desk = Desk::new();
    desk.save_adapter("one", SMOKE);
    desk.save_adapter("two", SMOKE);
    let told = desk.check_works("generate --model hf --adapter one --adapter b=two --prompt hi --raw --max-tokens 2");
    assert!(told.starts_with("== one\n") && told.contains("\n== b\n"), "{told}");
    let told = desk.check_works("evaluate --model hf --adapter one --adapter b=two --data data.jsonl");
    assert!(told.contains("one: loss") && told.contains("b: loss"), "{told}");
    let cases: [(&str, &[&str]); 2] = [
        ("generate --model hf --adapter a=one --adapter a=two --prompt hi", &["both called `a`", "NAME=DIR"]),
        (
            "logits --model hf --adapter one --adapter two --prompts data.jsonl --out logits",
            &["given 2 times", "those of one"],
        ),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let desk = Desk::new();
    desk.save_adapter("fits", SMOKE);
    desk.check_works("generate --model hf --adapter fits --prompt hi --raw --max-tokens 2");
    desk.save_adapter("narrow", &SMOKE.replace("width = 64", "width = 32"));
    desk.save_adapter("deep", &SMOKE.replace("blocks = 4", "blocks = 6"));
    let cases: [(&str, &[&str]); 4] = [
        (
            "narrow",
            &["narrow/adapter_model.safetensors", "has shape [4, 32]; expected [4, 64]; copy it again, or give"],
        ),
        ("deep", &["deep/adapter_model.safetensors", "holds 24 tensors; expected 16", "trained on this model"]),
        ("nowhere", &["nowhere/adapter_config.json", "check the path"]),
        ("hf", &["hf/adapter_config.json", "check the path"]),
    ];
    for (adapter, expected) in cases {
        desk.check_fails(&format!("generate --model hf --adapter {adapter} --prompt hi"), expected);
        desk.check_fails(&format!("train smoke.toml --data data.jsonl --out out --init-adapter {adapter}"), expected);
    }
}

#[test]
fn an_argument_that_makes_no_sense_is_named() {
    let desk = Desk::new();
    desk.write("foreign.jsonl", "{\"text\": \"a\"}\n{\"tokens\": [1, 99999]}\n");
    desk.write("none.jsonl", "{\"tokens\": []}\n");
    desk.write("words.jsonl", "{\"tokens\": [\"a\"]}\n");
    desk.write("empty.jsonl", "");
    desk.write("press-1.invite", "{\"text\": \"a\"}\n");
    fs::create_dir(desk.path("invites")).unwrap();
    fs::create_dir(desk.path("real")).unwrap();
    desk.write("real/press-1.jsonl", "{\"text\": \"what really happened\"}\n");
    desk.weights("base.gguf");
    desk.write("long.jsonl", format!("{{\"text\": \"{}\"}}\n", "a".repeat(5000)));
    fs::create_dir(desk.path("trained")).unwrap();
    desk.write("trained/adapter_config.json", "{}");
    desk.write("named.toml", SMOKE.replace("held_out = 0.2", "held_out = 0.2\ncolumns = { text = \"words\" }"));
    let cases: [(&str, &[&str]); 35] = [
        (
            "evaluate --model hf --data data.jsonl --sequence-tokens-max 100000",
            &["--sequence-tokens-max is 100000", "the model's context is"],
        ),
        ("evaluate --model hf --data data.jsonl --experiment none.toml", &["none.toml", "check the path"]),
        ("evaluate --model hf --data data.jsonl --experiment named.toml", &["expected `words`", "[data.columns]"]),
        (
            "train smoke.toml --data data.jsonl --out trained",
            &["trained/adapter_config.json", "already there", "--force"],
        ),
        ("init-adapter smoke.toml --out trained", &["trained/adapter_config.json", "already there", "--force"]),
        (
            "logits --model base.gguf --engine integer --out l --prompts long.jsonl",
            &["line 1", "5000 tokens", "context of", "cut it"],
        ),
        ("logits --model hf --cache f32 --out l --prompts long.jsonl", &["--cache", "--engine integer"]),
        ("generate --model hf --cache q8_0 --raw --prompt a", &["--cache", "--engine integer"]),
        (
            "generate --model base.gguf --engine integer --weights bf16 --raw --prompt a",
            &["--weights", "--engine float", "leave"],
        ),
        ("bench infer --model base.gguf --depth 5000", &["5512 tokens", "context of", "ask for fewer"]),
        ("bench infer --model hf", &["hf is no GGUF file", "coordinator quantize"]),
        ("device-log --out smoke.toml/logs", &["smoke.toml/logs", "move it away"]),
        ("device-log --out real", &["real/press-1.jsonl", "already there", "--force"]),
        ("train smoke.toml --data data.jsonl --dump-batches data.jsonl", &["--dump-batches", "replace what --data"]),
        ("train smoke.toml --data data.jsonl --out data.jsonl", &["data.jsonl is a file; name a directory"]),
        ("init-adapter smoke.toml --out smoke.toml", &["smoke.toml is a file; name a directory"]),
        ("join invites --data data.jsonl", &["invites: it is a directory", "name the invitation in it"]),
        ("join press-1.invite --data empty.jsonl", &["empty.jsonl", "holds no record"]),
        ("serve --model base.gguf --bind foo", &["--bind", "127.0.0.1:8080"]),
        ("bench infer --model nofile.gguf", &["nofile.gguf", "check the path"]),
        ("join press-1.invite --data data.jsonl --address coordinator", &["--address", "is not host:port"]),
        ("logits --model hf --out l --prompts foreign.jsonl", &["foreign.jsonl, line 2", "token 99999", "of 259"]),
        ("logits --model hf --out l --prompts none.jsonl", &["none.jsonl, line 1", "at least one token"]),
        ("logits --model hf --out l --prompts words.jsonl", &["words.jsonl, line 1", "no list of token ids"]),
        ("logits --model hf --out l --prompts empty.jsonl", &["empty.jsonl", "holds no prompt"]),
        ("generate --model hf --prompt hi", &["no chat template", "--raw"]),
        ("generate --model hf --prompt hi --temperature nan", &["value 'nan'", "--temperature", "0 or more"]),
        ("generate --model hf --prompt hi --temperature -1", &["value '-1'", "--temperature", "0 or more"]),
        ("generate --model hf --prompt hi --backend cuda", &["`cuda` is not compiled in", "--features cuda"]),
        ("evaluate --model hf --data data.jsonl --sequence-tokens-max 1", &["sequence_tokens_max = 1", "at least 2"]),
        ("device-log --out logs --records 0", &["invalid value '0'", "--records"]),
        ("device-log --out logs --devices 0", &["0 is not in 1..", "--devices"]),
        ("join press-1.invite --data data.jsonl", &["press-1.invite", "not an invitation", "ask the coordinator"]),
        ("join nowhere.invite --data data.jsonl", &["nowhere.invite", "check the path"]),
        (
            "swarm smoke.toml --count 4 --data data.jsonl --invites invites",
            &["invites holds 0 invitations for 4 participants", "coordinator invite HOME NAME --count 4 --out invites"],
        ),
    ];
    for (arguments, expected) in cases {
        desk.check_fails(arguments, expected);
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error_and_no_panic() {
    let desk = Desk::new();
    let Ok(full) = fs::OpenOptions::new().write(true).open("/dev/full") else { return };
    let mut command = desk.command("evaluate --model hf --data data.jsonl");
    check_failure(
        &command.stdout(full).output().unwrap(),
        "evaluate > /dev/full",
        &["failed to print", "No space left"],
    );
}

#[test]
fn who_stops_reading_is_no_failure() {
    let desk = Desk::new();
    for arguments in ["--max-tokens 5", "--max-tokens 5 --json"] {
        let mut command = desk.command(&format!("generate --model hf --prompt hi --raw {arguments}"));
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(process.stdout.take());
        let output = process.wait_with_output().unwrap();
        assert!(output.status.success() && !String::from_utf8_lossy(&output.stderr).contains("error"), "{output:?}");
    }
}

#[test]
fn what_becomes_of_the_records_is_told_once() {
    let desk = Desk::new();
    desk.save_adapter("one", SMOKE);
    desk.save_adapter("two", SMOKE);
    let long = format!("{{\"text\": \"{}\"}}\n", "a".repeat(500));
    desk.write("long.jsonl", format!("{long}{{\"text\": \"b\"}}\n{long}"));
    desk.write("one.jsonl", "{\"text\": \"a single record\"}\n");
    let cut = "2 of 3 records are cut to 128 tokens (data.sequence_tokens_max)";
    let cut_to_64 = "2 of 3 records are cut to 64 tokens (--sequence-tokens-max)";
    for (arguments, expected) in [
        ("train smoke.toml --steps 1 --out a --data long.jsonl", cut),
        ("train smoke.toml --steps 1 --out b --data one.jsonl", "no record is held out: of 1, data.held_out = 0.2"),
        ("evaluate --model hf --adapter one --adapter two --sequence-tokens-max 64 --data long.jsonl", cut_to_64),
        ("calibrate --model hf --out matrix.gguf --sequence-tokens-max 64 --data long.jsonl", cut_to_64),
    ] {
        let output = desk.command(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.matches(expected).count() == 1, "participant {arguments}\n{told}");
        assert!(!told.contains("aaaa"), "{told}");
    }
}

#[test]
fn every_command_has_help_with_an_example() {
    let desk = Desk::new();
    let help = desk.check_works("--help");
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let commands: Vec<&str> = commands.filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() > 8, "{help}");
    for command in commands.into_iter().filter(|command| *command != "help") {
        let help = desk.check_works(&format!("{command} --help"));
        assert!(help.contains("Example") && help.contains(&format!("participant {command} ")), "{help}");
    }
}

/// A directory with `smoke.toml`, records in `data.jsonl`, and the experiment's model in `hf/`.
struct Desk {
    directory: TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self { directory: tempfile::tempdir().unwrap() };
        desk.write("smoke.toml", SMOKE);
        let records: Vec<String> = (0..20).map(|i| format!("{{\"text\": \"record {i} of a device\"}}\n")).collect();
        desk.write("data.jsonl", records.concat());

        desk.directory_of("hf", &*model::source::of_experiment(&smoke(SMOKE)).unwrap());
        desk
    }

    /// A model as Hugging Face keeps it.
    fn directory_of(&self, name: &str, source: &dyn Source) {
        fs::create_dir(self.path(name)).unwrap();
        self.write(&format!("{name}/config.json"), source.config().to_huggingface().to_string());
        self.write(&format!("{name}/tokenizer.json"), source.tokenizer().json());
        let values = source.tensors().iter().map(|info| {
            let values = source.tensor(&info.name, &info.shape).unwrap();
            (info, bytemuck::cast_slice::<f32, u8>(&values).to_vec())
        });
        let values: Vec<_> = values.collect();
        let views = values
            .iter()
            .map(|(info, bytes)| (info.name.as_str(), TensorView::new(Dtype::F32, info.shape.clone(), bytes).unwrap()));
        self.write(&format!("{name}/model.safetensors"), safetensors::serialize(views, None).unwrap());
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

    /// A whole file in GGUF that describes the model and holds neither tokenizer nor weights.
    fn gguf(&self) -> Vec<u8> {
        let source = model::source::of_experiment(&smoke(SMOKE)).unwrap();
        let path = self.path("header.gguf");
        Writer::create(&path, gguf_metadata(source.config(), "smoke")).unwrap().finish().unwrap();
        fs::read(path).unwrap()
    }

    /// The model as a file in GGUF, quantized where rows are whole blocks.
    fn weights(&self, name: &str) {
        let source = model::source::of_experiment(&smoke(SMOKE)).unwrap();
        let mut header = gguf_metadata(source.config(), "smoke");
        let tokenizer = source.tokenizer().gguf().unwrap();
        header.set("tokenizer.ggml.model", tokenizer.model);
        header.set("tokenizer.ggml.tokens", tokenizer.tokens);
        header.set("tokenizer.ggml.token_type", tokenizer.token_types);
        header.set("tokenizer.ggml.merges", tokenizer.merges);
        header.set("tokenizer.ggml.pre", tokenizer.pre.unwrap());
        header.set("tokenizer.ggml.eos_token_id", tokenizer.eos.unwrap());
        header.set("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}");
        let ty = |shape: &[usize]| match shape {
            [_, columns] if columns.is_multiple_of(32) => BlockType::Q8_0,
            [_, _] => BlockType::F16,
            _ => BlockType::F32,
        };
        for info in source.tensors() {
            header.add_tensor(&gguf_tensor_name(&info.name), &info.shape, ty(&info.shape)).unwrap();
        }
        let mut writer = Writer::create(&self.path(name), header).unwrap();
        for info in source.tensors() {
            let values = source.tensor(&info.name, &info.shape).unwrap();
            let bytes = quant::quantize(ty(&info.shape), &values).unwrap();
            writer.write_tensor(&gguf_tensor_name(&info.name), &bytes).unwrap();
        }
        writer.finish().unwrap();
    }

    fn save_adapter(&self, name: &str, experiment: &str) {
        let experiment = smoke(experiment);
        let source = model::source::of_experiment(&experiment).unwrap();
        let config = AdapterConfig::new(&experiment.adapter);
        let adapter = Adapter::seeded(config, source.config(), 0..source.config().blocks, Seed(1)).unwrap();
        adapter.save(&self.path(name), "base").unwrap();
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(Path::new(env!("CARGO_BIN_EXE_participant")));
        command.args(arguments.split_whitespace()).current_dir(self.directory.path()).stdin(Stdio::null());
        command.env("HEADWATER_CACHE", self.path("cache")).env_remove("RUST_LOG");
        command
    }

    fn check_works(&self, arguments: &str) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "participant {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn check_fails(&self, arguments: &str, expected: &[&str]) {
        check_failure(&self.command(arguments).output().unwrap(), arguments, expected);
    }
}

fn check_failure(output: &Output, arguments: &str, expected: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let told = format!("participant {arguments}\nexit code {:?}\n{stderr}", output.status.code());
    assert!(matches!(output.status.code(), Some(1 | 2)), "{told}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{told}");
    // A wrong line of TOML and a command's usage are shown below the message.
    let shown = ["TOML parse error", "--help"].iter().any(|text| stderr.contains(text));
    assert!(stderr.trim_end().lines().count() == 1 || shown, "{told}");
    for expected in expected {
        assert!(stderr.contains(expected), "{expected:?} is missing from: {told}");
    }
}

fn smoke(text: &str) -> Experiment {
    Experiment::from_toml(text, "smoke.toml").unwrap()
}
