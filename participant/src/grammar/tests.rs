//! What a grammar lets through is what its schema means, whoever writes the answer.

use std::sync::Arc;

use model::tokenizer::Tokenizer;
use proptest::prelude::*;
use rand::Rng;
use serde_json::{Value, json};

use super::{Allowed, Grammar, Matcher, Spelling};
use crate::sampler::{Sampler, Sampling};

fn matcher(schema: &Value) -> Matcher {
    Matcher::new(Arc::new(Grammar::schema(schema).unwrap()))
}

/// Whether a whole text is one that the schema's grammar allows.
fn takes(schema: &Value, text: &str) -> bool {
    let mut matcher = matcher(schema);
    matcher.push(text.as_bytes()) && matcher.may_end()
}

fn check(schema: Value, good: &[&str], bad: &[&str]) {
    for text in good {
        serde_json::from_str::<Value>(text).unwrap();
        assert!(takes(&schema, text), "{schema} takes {text}");
    }
    for text in bad {
        assert!(!takes(&schema, text), "{schema} does not take {text}");
    }
}

#[test]
fn any_json_is_what_a_parser_takes() {
    let good = [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-12.5e+3",
        "1E9",
        r#""""#,
        r#""é\n\"\u00e9\ud7ff""#,
        "[]",
        "{}",
        " {\n  \"a\" : [ 1 , 2 ] }",
        r#"{"a":{"b":[[],{}]},"c":""}"#,
        "\"\u{10ffff}\u{800}\u{7f}\"",
    ];
    let bad = [
        "",
        "nul",
        "01",
        "1.",
        ".5",
        "1e",
        "+1",
        "--1",
        "\"",
        "\"\n\"",
        r#""\x""#,
        r#""\ud800""#,
        "[1,]",
        "[,1]",
        "{,}",
        r#"{"a"}"#,
        r#"{"a":}"#,
        "{a:1}",
        "1 2",
        "[1 2]",
        "truefalse",
    ];
    check(json!(true), &good, &bad);
    let mut matcher = matcher(&json!(true));
    // Bytes that are no UTF-8: alone, too long a form, a surrogate, beyond Unicode, an end in the middle.
    for bytes in [&b"\"\x80"[..], b"\"\xc0\xaf", b"\"\xed\xa0\x80", b"\"\xf4\x90\x80\x80", b"\"\xc3\""] {
        assert!(!matcher.push(bytes));
        matcher = self::matcher(&json!(true));
    }
}

#[test]
fn schemas_allow_what_they_say() {
    check(json!({"type": "integer"}), &["0", "-7", "123"], &["1.5", "1e3", "\"1\"", "007", "-0"]);
    check(json!({"type": ["string", "null"]}), &["null", "\"\""], &["0", "nil"]);
    check(
        json!({"enum": ["a", "ab", 1, 12, null]}),
        &["\"a\"", "\"ab\"", "1", "12", "null"],
        &["\"b\"", "2", "\"abc\""],
    );
    check(json!({"enum": ["a", 1], "type": "integer"}), &["1"], &["\"a\""]);
    check(json!({"const": {"b": [1, 2]}}), &[r#"{"b":[1,2]}"#], &[r#"{"b":[2,1]}"#]);
    check(
        json!({"type": "string", "minLength": 2, "maxLength": 3}),
        &["\"ab\"", "\"äöü\"", "\"\\n\\u0041\""],
        &["\"a\"", "\"abcd\""],
    );
    check(
        json!({"minItems": 1, "maxItems": 2, "items": {"type": "boolean"}}),
        &["[true]", "[true, false]"],
        &["[]", "[1]", "[true,true,true]"],
    );
    check(json!({"type": "array", "minItems": 2}), &["[1,2]", "[1,2,3,4]"], &["[1]", "[]"]);
    check(json!({"type": "array", "maxItems": 0}), &["[]"], &["[1]"]);
    check(
        json!({"properties": {"name": {"type": "string"}, "names": {"type": "integer"}, "n": {"type": "null"}},
            "required": ["name"], "additionalProperties": false}),
        &[r#"{"name":""}"#, r#"{"names": 1, "name": "x"}"#, r#"{"n":null,"name":"","names":2}"#],
        &[
            "{}",
            r#"{"names":1}"#,
            r#"{"name":""  ,}"#,
            r#"{"name":"","name":""}"#,
            r#"{"other":1,"name":""}"#,
            r#"{"nam":1,"name":""}"#,
        ],
    );
    check(
        json!({"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "boolean"}, "required": ["b"]}),
        &[r#"{"a":1,"b":true}"#, r#"{"b":true,"aa":false,"":true,"é":true}"#],
        &[r#"{"a":true,"b":true}"#, r#"{"b":1}"#, r#"{"a":1}"#, r#"{"b":true,"\u0061":true}"#],
    );
    check(
        json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"properties": {"of": {"items": {"$ref": "#/$defs/tree"}}},
            "required": ["of"], "additionalProperties": false}}}),
        &[r#"{"of":[]}"#, r#"{"of":[{"of":[]},{"of":[{"of":[]}]}]}"#],
        &["{}", r#"{"of":[[]]}"#],
    );
    check(
        json!({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "string", "minLength": 3}, {"const": "ab"}]}),
        &["\"\"", "\"ab\"", "\"abc\""],
        &["\"ac\""],
    );
    check(json!({"anyOf": [{"$ref": "#"}, {"type": "null"}]}), &["null"], &["1"]);
}

#[test]
fn what_cannot_be_promised_is_refused_by_its_name() {
    for (schema, expected) in [
        (json!(false), "is no schema"),
        (json!([]), "is no schema"),
        (json!({"type": "strin"}), "`strin`"),
        (json!({"type": "string", "pattern": "a+"}), "`pattern`"),
        (json!({"type": "integer", "minimum": 3}), "`minimum`"),
        (json!({"oneOf": [{}]}), "`oneOf`"),
        (json!({"type": "array", "uniqueItems": true}), "`uniqueItems`"),
        (
            json!({"properties": {"a": {"properties": {"b": {"format": "date"}}}}}),
            "#/properties/a/properties/b: `format`",
        ),
        (json!({"$ref": "#/$defs/none"}), "#/$defs/none"),
        (json!({"$ref": "other.json"}), "`$ref`"),
        (json!({"$ref": "#"}), "is itself"),
        (json!({"allOf": [{}, {}]}), "`allOf`"),
        (json!({"enum": []}), "allows no value"),
        (json!({"enum": [1], "type": "string"}), "allows no value"),
        (json!({"enum": ["a"], "type": 5}), "`type` is no name"),
        (json!({"const": "a", "type": ["strin"]}), "`strin`"),
        (json!({"type": ["string", null]}), "`type` is no name"),
        (json!({"anyOf": [{"$ref": "#"}]}), "only itself"),
        (json!({"properties": {"a".repeat(5000): {}}}), "a name of more than 4096 bytes"),
        (json!({"required": ["a".repeat(70_000)]}), "a name of more than 4096 bytes"),
        (json!({"required": ["a"], "additionalProperties": false}), "requires `a`"),
        (json!({"type": "string", "minLength": 3, "maxLength": 2}), "`minLength` is larger"),
        (json!({"type": "string", "maxLength": -1}), "`maxLength`"),
        (json!({"type": "array", "items": {"minItems": 1e9}}), "`minItems`"),
    ] {
        let error = Grammar::schema(&schema).err().unwrap_or_else(|| panic!("{schema} is refused")).to_string();
        assert!(error.starts_with("the schema, ") && error.contains(expected), "{error}");
    }
    let deep = (0..100).fold(json!({}), |inner, _| json!({"items": inner}));
    assert!(Grammar::schema(&deep).is_ok());
    let many: serde_json::Map<String, Value> = (0..65).map(|i| (format!("p{i}"), json!({}))).collect();
    assert!(Grammar::schema(&json!({"properties": many})).is_err());
}

/// Definitions `a0` to `a(count - 1)`, each of which is made of the next's reference; the last is a string.
fn chain(count: usize, of: impl Fn(Value) -> Value) -> Value {
    let name = |i: usize| format!("a{i}");
    let mut parts: serde_json::Map<String, Value> =
        (0..count).map(|i| (name(i), of(json!({"$ref": format!("#/$defs/{}", name(i + 1))})))).collect();
    parts.insert(name(count), json!({"type": "string"}));
    json!({"$ref": "#/$defs/a0", "$defs": parts})
}

#[test]
fn schemas_within_each_other_have_an_end() {
    // On the small stack of a thread that serves.
    for of in [|next| json!({"items": next}), |next| json!({"allOf": [next]}), |next| next] {
        let error = Grammar::schema(&chain(2000, of)).err().unwrap().to_string();
        assert!(error.contains("is within more than 128 others"), "{error}");
    }
    assert!(takes(&chain(40, |next| json!({"items": next})), &format!("{}\"\"{}", "[".repeat(40), "]".repeat(40))));
}

#[test]
fn alternatives_of_alternatives_are_tried_once() {
    // Two to the power of forty paths.
    check(chain(40, |next| json!({"anyOf": [next, next]})), &["\"a\""], &["1"]);
    // Each is all others.
    let all: Vec<Value> = (0..60).map(|i| json!({"$ref": format!("#/$defs/a{i}")})).collect();
    let parts: serde_json::Map<String, Value> = (0..60)
        .map(|i| (format!("a{i}"), json!({"anyOf": all.iter().chain([&json!({"const": i})]).collect::<Vec<_>>()})))
        .collect();
    check(json!({"$ref": "#/$defs/a7", "$defs": parts}), &["0", "59"], &["60"]);
}

#[test]
fn no_alternative_is_lost() {
    let object =
        |i: usize| json!({"properties": {"kind": {"const": i}, "of": {"type": "string"}}, "required": ["kind"]});
    let any_of = |count: usize| json!({"anyOf": (0..count).map(object).collect::<Vec<_>>()});
    for i in 0..64 {
        assert!(takes(&any_of(64), &format!("{{\"of\":\"\",\"kind\":{i}}}")), "{i}");
    }
    let error = Grammar::schema(&any_of(70)).err().unwrap().to_string();
    assert!(error.contains("`anyOf` has 70 alternatives; 64 are the most"), "{error}");
    let within: Vec<Value> =
        (0..7).map(|i| json!({"anyOf": (10 * i..10 * i + 10).map(object).collect::<Vec<_>>()})).collect();
    let error = Grammar::schema(&json!({"anyOf": within})).err().unwrap().to_string();
    assert!(error.contains("70 alternatives within alternatives"), "{error}");
    // Seventy plain values are one alternative.
    let values: Vec<usize> = (0..70).collect();
    (0..70).for_each(|i| assert!(takes(&json!({"enum": values}), &i.to_string())));
    // Ways to read an answer multiply where alternatives hold alternatives, and then nothing is promised.
    let list = |items: Value| json!({"anyOf": (1..20).map(|max| json!({"items": items, "maxItems": max})).collect::<Vec<_>>()});
    let mut matcher = matcher(&list(list(json!({"type": "null"}))));
    assert!(matcher.push(b"[") && !matcher.push(b"["));
}

#[test]
fn trying_all_tokens_ends_in_time() {
    let spelling = Spelling::of(vec![(b"1".to_vec(), 0), (b"[".to_vec(), 1)], Vec::new());
    let (mut matcher, mut allowed) = (matcher(&json!(true)), Allowed::default());
    assert!(!spelling.allowed(&mut matcher, Some(std::time::Instant::now()), &mut allowed));
    assert!(spelling.allowed(&mut matcher, None, &mut allowed) && allowed.holds(0) && allowed.holds(1));
}

/// Opens one more object, where that is allowed.
fn takes_more(matcher: &mut Matcher) -> bool {
    let mut allowed = Allowed::default();
    Spelling::of(vec![(b"{".to_vec(), 0)], Vec::new()).allowed(matcher, None, &mut allowed);
    allowed.holds(0) && matcher.push(b"{\"a\":")
}

#[test]
fn nesting_has_an_end() {
    let mut matcher = matcher(&json!(true));
    let taken = (0..1000).take_while(|_| matcher.push(b"[")).count();
    // As deep as serde_json reads, and no deeper.
    assert!((30..128).contains(&taken), "{taken}");
    assert!(!matcher.may_end());
    // Where nothing may hold another value any more, plain ones may still come, and all ends.
    let mut matcher = self::matcher(&json!(true));
    let taken = (0..1000).take_while(|_| takes_more(&mut matcher)).count();
    assert!(matcher.push(b"1") && matcher.push("}".repeat(taken).as_bytes()) && matcher.is_over());
}

/// A schema of which every answer ends, with what a value of it has to satisfy.
fn schema() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "integer"})),
        Just(json!({"type": "number"})),
        Just(json!({"type": ["boolean", "null"]})),
        (0u32..3, 0u32..3).prop_map(|(min, more)| json!({"type": "string", "minLength": min, "maxLength": min + more})),
        prop::collection::vec("[a-c]{0,3}", 1..4).prop_map(|all| json!({"enum": all})),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            (inner.clone(), 0u32..2, 0u32..3).prop_map(
                |(items, min, more)| json!({"type": "array", "items": items, "minItems": min, "maxItems": min + more})
            ),
            prop::collection::vec(inner.clone(), 1..3).prop_map(|kinds| json!({"anyOf": kinds})),
            (prop::collection::btree_map("[a-c]{0,2}", inner, 1..4), any::<u8>()).prop_map(|(properties, bits)| {
                let required = properties.keys().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, name)| name);
                let required: Vec<&String> = required.collect();
                json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
            }),
        ]
    })
}

/// Whether a value is what such a schema says: by the standard's words, not by our grammar.
fn is_valid(value: &Value, schema: &Value) -> bool {
    if let Some(kinds) = schema["anyOf"].as_array() {
        return kinds.iter().any(|kind| is_valid(value, kind));
    }
    if let Some(all) = schema["enum"].as_array() {
        return all.contains(value);
    }
    let within = |count: usize, min: &str, max: &str| {
        (schema[min].as_u64().unwrap_or(0)..=schema[max].as_u64().unwrap_or(u64::MAX)).contains(&(count as u64))
    };
    let is = |ty: &Value| schema["type"] == *ty || schema["type"].as_array().is_some_and(|types| types.contains(ty));
    match value {
        Value::Null => is(&json!("null")),
        Value::Bool(_) => is(&json!("boolean")),
        Value::Number(number) => is(&json!("number")) || is(&json!("integer")) && !number.is_f64(),
        Value::String(text) => is(&json!("string")) && within(text.chars().count(), "minLength", "maxLength"),
        Value::Array(items) => {
            is(&json!("array"))
                && within(items.len(), "minItems", "maxItems")
                && items.iter().all(|item| is_valid(item, &schema["items"]))
        }
        Value::Object(members) => {
            let names = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
            is(&json!("object"))
                && names.iter().all(|name| members.contains_key(name.as_str().unwrap()))
                && members
                    .iter()
                    .all(|(name, value)| schema["properties"].get(name).is_some_and(|schema| is_valid(value, schema)))
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_model_would_say_becomes_a_valid_answer(schema in schema(), seed: u64) {
        let tokenizer = Tokenizer::bytes();
        let spelling = Spelling::new(&tokenizer);
        let mut matcher = matcher(&schema);
        let mut allowed = Allowed::default();
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, seed, ..Sampling::default() }, 259);
        let mut noise = experiment::Seed(seed).generator("logits");
        let mut bytes = Vec::new();
        while !matcher.is_over() {
            prop_assert!(bytes.len() < 1 << 16, "{} has no end", String::from_utf8_lossy(&bytes));
            spelling.allowed(&mut matcher, None, &mut allowed);
            let logits: Vec<f32> = (0..259)
                .map(|id| if allowed.holds(id) { noise.random_range(-1.0..1.0) } else { f32::NEG_INFINITY })
                .collect();
            let token = sampler.choose(&logits);
            prop_assert!(allowed.holds(token));
            if tokenizer.settings().eos.contains(&token) {
                break;
            }
            let piece = tokenizer.token_bytes(token).unwrap();
            prop_assert!(matcher.push(&piece));
            bytes.extend(piece);
        }
        prop_assert!(matcher.may_end());
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|error| TestCaseError::fail(format!("{error}: {}", String::from_utf8_lossy(&bytes))))?;
        prop_assert!(is_valid(&value, &schema), "{value} of {schema}");
    }

    #[test]
    fn the_tokens_that_are_allowed_are_those_that_can_be_pushed(
        text in r#"[\[{"a1,:\]} ]{0,12}"#, words in prop::collection::btree_set(r#"[\[{"a1,:\]} ]{1,4}"#, 1..40),
    ) {
        let spelling = Spelling::of(words.iter().map(|word| word.as_bytes().to_vec()).zip(0..).collect(), vec![99]);
        let begun = || { let mut matcher = matcher(&json!(true)); matcher.push(text.as_bytes()).then_some(matcher) };
        if let Some(mut matcher) = begun() {
            let mut allowed = Allowed::default();
            spelling.allowed(&mut matcher, None, &mut allowed);
            for (word, id) in words.iter().zip(0..) {
                prop_assert_eq!(allowed.holds(id), begun().unwrap().push(word.as_bytes()), "{} behind {}", word, text);
            }
            prop_assert_eq!(allowed.holds(99), matcher.may_end());
        }
    }
}
