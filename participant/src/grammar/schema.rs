//! JSON Schema (draft 2020-12) as nodes of a grammar.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::place::{At, refused, shown};
use crate::ParticipantError;

/// Node 0 is where an answer begins.
pub struct Grammar {
    pub(super) nodes: Vec<Node>,
}

/// A place in [`Grammar::nodes`].
pub(super) type NodeId = u16;

#[derive(Debug)]
pub(super) enum Node {
    /// One of these texts, sorted.
    Literals(Vec<Vec<u8>>),
    /// Lengths in characters.
    String {
        min: u32,
        max: u32,
    },
    Number {
        whole: bool,
    },
    Array {
        items: NodeId,
        min: u32,
        max: u32,
    },
    Object(Object),
    /// Other nodes, none of which is one of these: what such a one allows stands here itself.
    AnyOf(Vec<NodeId>),
}

#[derive(Debug)]
pub(super) struct Object {
    /// Names as they are written, with the quotation mark that ends them, sorted; and what they name.
    pub names: Vec<(Vec<u8>, NodeId)>,
    /// Bit by place in `names`.
    pub required: u64,
    /// What other names name, where there may be others.
    pub others: Option<NodeId>,
}

pub(super) const UNBOUNDED: u32 = u32::MAX;

const NODES_MAX: usize = 4096;
/// Schemas within each other, and behind references: as deep as serde_json reads, and no threat to a thread's stack.
const DEPTH_MAX: usize = 128;
/// What a value can be one of. The matcher follows all of them at once.
const ALTERNATIVES_MAX: usize = 64;
const NAMES_MAX: usize = 64;
const LITERALS_MAX: usize = 1024;
const LITERAL_BYTES_MAX: usize = 4096;
const COUNT_MAX: u64 = 4096;
const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];

/// What says nothing about what is valid.
const REMARKS: [&str; 13] = [
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "strict",
];

impl Grammar {
    /// Any JSON.
    pub fn json() -> Self {
        Self::schema(&Value::Bool(true)).expect("the schema of everything")
    }

    /// Any JSON object.
    pub fn object() -> Self {
        Self::schema(&serde_json::json!({"type": "object"})).expect("the schema of all objects")
    }

    /// What a schema allows; of several ways to write a value, those without superfluous escapes.
    ///
    /// # Errors
    /// If it is none, too large, or says what we cannot promise.
    pub fn schema(schema: &Value) -> Result<Self, ParticipantError> {
        let mut compiler = Compiler::new(schema);
        let at = &At::Pointer("");
        // The beginning has the first place, whatever is compiled first.
        let place = compiler.reserve(at)?;
        let node = compiler.compile(schema, at)?;
        compiler.nodes[usize::from(place)] = Some(Node::AnyOf(vec![node]));
        let nodes = compiler.nodes.into_iter().map(|node| node.expect("every reserved node was compiled")).collect();
        let mut grammar = Self { nodes };
        grammar.flatten()?;
        Ok(grammar)
    }

    /// Puts in the place of alternatives that have alternatives themselves what these are in the end, each once: the matcher
    /// then never walks the paths between them, of which there may be exponentially many.
    fn flatten(&mut self) -> Result<(), ParticipantError> {
        // By node, the last one from which it was seen.
        let mut seen = vec![usize::MAX; self.nodes.len()];
        for from in 0..self.nodes.len() {
            let Node::AnyOf(kinds) = &self.nodes[from] else { continue };
            let (mut open, mut flat) = (kinds.clone(), Vec::new());
            while let Some(node) = open.pop() {
                let place = usize::from(node);
                if std::mem::replace(&mut seen[place], from) == from {
                    continue;
                }
                match &self.nodes[place] {
                    Node::AnyOf(kinds) => open.extend(kinds),
                    _ => flat.push(node),
                }
            }
            let root = &At::Pointer("");
            match flat.len() {
                0 => return Err(refused(root, "has a part that is only itself, and allows no value")),
                1..=ALTERNATIVES_MAX => self.nodes[from] = Node::AnyOf(flat),
                count => {
                    let what = format_args!("has {count} alternatives within alternatives for one value; {FEWER}");
                    return Err(refused(root, what));
                }
            }
        }
        Ok(())
    }
}

const FEWER: &str = "64 are the most: list plain values in one `enum`, or say it with fewer";

struct Compiler<'a> {
    root: &'a Value,
    nodes: Vec<Option<Node>>,
    /// What references name.
    named: BTreeMap<String, NodeId>,
    any: Option<NodeId>,
    /// Schemas that are being compiled.
    depth: usize,
    /// Of all nodes.
    alternatives: usize,
}

impl<'a> Compiler<'a> {
    fn new(root: &'a Value) -> Self {
        Self { root, nodes: Vec::new(), named: BTreeMap::new(), any: None, depth: 0, alternatives: 0 }
    }

    fn reserve(&mut self, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        if self.nodes.len() >= NODES_MAX {
            return Err(refused(at, format_args!("has more than {NODES_MAX} parts; give a smaller one")));
        }
        self.nodes.push(None);
        Ok((self.nodes.len() - 1) as NodeId)
    }

    fn add(&mut self, node: Node, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        let place = self.reserve(at)?;
        self.nodes[usize::from(place)] = Some(node);
        Ok(place)
    }

    fn any(&mut self, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        if let Some(any) = self.any {
            return Ok(any);
        }
        let any = self.reserve(at)?;
        self.any = Some(any);
        let words = vec![b"false".to_vec(), b"null".to_vec(), b"true".to_vec()];
        let kinds = [
            Node::Object(Object { names: Vec::new(), required: 0, others: Some(any) }),
            Node::Array { items: any, min: 0, max: UNBOUNDED },
            Node::String { min: 0, max: UNBOUNDED },
            Node::Number { whole: false },
            Node::Literals(words),
        ];
        let kinds: Result<Vec<NodeId>, _> = kinds.into_iter().map(|kind| self.add(kind, at)).collect();
        self.nodes[usize::from(any)] = Some(Node::AnyOf(kinds?));
        Ok(any)
    }

    fn any_of(&mut self, kinds: Vec<NodeId>, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        self.alternatives += kinds.len();
        match self.alternatives > NODES_MAX {
            true => Err(refused(at, format_args!("has more than {NODES_MAX} alternatives in all; give a smaller one"))),
            false => self.add(Node::AnyOf(kinds), at),
        }
    }

    fn compile(&mut self, schema: &Value, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        if self.depth >= DEPTH_MAX {
            let what = format_args!("is within more than {DEPTH_MAX} others, references included; give a flatter one");
            return Err(refused(at, what));
        }
        self.depth += 1;
        let node = self.compile_here(schema, at);
        self.depth -= 1;
        node
    }

    fn compile_here(&mut self, schema: &Value, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        let map = match schema {
            Value::Bool(true) => return self.any(at),
            Value::Object(map) => map,
            _ => return Err(refused(at, "is no schema, which is an object, or true")),
        };
        let left: Vec<&str> = map.keys().map(String::as_str).filter(|key| !REMARKS.contains(key)).collect();
        let alone = |key: &str| match left[..] {
            [_] => Ok(()),
            _ => Err(refused(at, format_args!("`{key}` beside other keywords is not supported; leave them out"))),
        };
        if let Some(reference) = map.get("$ref") {
            alone("$ref")?;
            return self.reference(reference, at);
        }
        if let Some(all) = map.get("allOf") {
            alone("allOf")?;
            return match all.as_array().map(Vec::as_slice) {
                Some([one]) => self.compile(one, &At::Item(at, "allOf", 0)),
                _ => Err(refused(at, "`allOf` of several schemas is not supported; write one that says all")),
            };
        }
        if let Some(kinds) = map.get("anyOf") {
            alone("anyOf")?;
            let kinds = kinds.as_array().filter(|kinds| !kinds.is_empty());
            let kinds = kinds.ok_or_else(|| refused(at, "`anyOf` is no list of schemas"))?;
            if kinds.len() > ALTERNATIVES_MAX {
                return Err(refused(at, format_args!("`anyOf` has {} alternatives; {FEWER}", kinds.len())));
            }
            let kinds = kinds.iter().enumerate().map(|(i, kind)| self.compile(kind, &At::Item(at, "anyOf", i)));
            let kinds = kinds.collect::<Result<_, _>>()?;
            return self.any_of(kinds, at);
        }
        let types = types(map, at)?;
        if let Some(value) = map.get("const") {
            check_known(map, &["const", "type"], at)?;
            return self.literals(std::slice::from_ref(value), &types, at);
        }
        if let Some(values) = map.get("enum") {
            check_known(map, &["enum", "type"], at)?;
            let values = values.as_array().ok_or_else(|| refused(at, "`enum` is no list"))?;
            return self.literals(values, &types, at);
        }
        let types = match (types.is_empty(), implied(map)) {
            (false, _) => types,
            (true, Some(ty)) => vec![ty],
            (true, None) => {
                check_known(map, &[], at)?;
                return self.any(at);
            }
        };
        let known: Vec<&str> = types.iter().flat_map(|ty| keywords(ty)).copied().chain(["type"]).collect();
        check_known(map, &known, at)?;
        let mut kinds = Vec::with_capacity(types.len());
        for ty in types {
            kinds.push(self.of_type(ty, map, at)?);
        }
        match kinds[..] {
            [one] => Ok(one),
            _ => self.any_of(kinds, at),
        }
    }

    fn of_type(&mut self, ty: &str, map: &Map<String, Value>, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        let node = match ty {
            "null" => Node::Literals(vec![b"null".to_vec()]),
            "boolean" => Node::Literals(vec![b"false".to_vec(), b"true".to_vec()]),
            "integer" => Node::Number { whole: true },
            "number" => Node::Number { whole: false },
            "string" => {
                let (min, max) = counts(map, "minLength", "maxLength", at)?;
                Node::String { min, max }
            }
            "array" => {
                let (min, max) = counts(map, "minItems", "maxItems", at)?;
                let items = self.compile(map.get("items").unwrap_or(&Value::Bool(true)), &At::Keyword(at, "items"))?;
                Node::Array { items, min, max }
            }
            "object" => Node::Object(self.object(map, at)?),
            _ => unreachable!("types are checked when they are read"),
        };
        self.add(node, at)
    }

    fn object(&mut self, map: &Map<String, Value>, at: &At<'_>) -> Result<Object, ParticipantError> {
        let others = match map.get("additionalProperties") {
            Some(Value::Bool(false)) => None,
            others => {
                let others = others.unwrap_or(&Value::Bool(true));
                Some(self.compile(others, &At::Keyword(at, "additionalProperties"))?)
            }
        };
        let mut names: BTreeMap<Vec<u8>, NodeId> = BTreeMap::new();
        let empty = Map::new();
        let properties = map.get("properties").map_or(Some(&empty), Value::as_object);
        for (name, schema) in properties.ok_or_else(|| refused(at, "`properties` is no object"))? {
            let at = &At::Property(at, name);
            names.insert(checked(name, at)?, self.compile(schema, at)?);
        }
        let required = map.get("required").map_or(Some(&[][..]), |names| names.as_array().map(Vec::as_slice));
        let required = required.and_then(|names| names.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        let required = required.ok_or_else(|| refused(at, "`required` is no list of names"))?;
        let required = required.into_iter().map(|name| checked(name, at)).collect::<Result<BTreeSet<_>, _>>()?;
        for name in &required {
            match (names.contains_key(name), others) {
                (true, _) => {}
                (false, Some(others)) => drop(names.insert(name.clone(), others)),
                (false, None) => {
                    let name = String::from_utf8_lossy(&name[..name.len() - 1]);
                    return Err(refused(at, format_args!("requires `{}`, and does not allow it", shown(&name))));
                }
            }
        }
        if names.len() > NAMES_MAX {
            return Err(refused(at, format_args!("names more than {NAMES_MAX} properties; give a smaller one")));
        }
        let required = required.iter().filter_map(|name| names.keys().position(|known| known == name));
        let required = required.fold(0, |bits, place| bits | 1 << place);
        Ok(Object { names: names.into_iter().collect(), required, others })
    }

    fn literals(&mut self, values: &[Value], types: &[&str], at: &At<'_>) -> Result<NodeId, ParticipantError> {
        let fits = |value: &&Value| types.is_empty() || types.iter().any(|ty| is_of(value, ty));
        let mut texts: Vec<Vec<u8>> = values.iter().filter(fits).map(|value| value.to_string().into_bytes()).collect();
        texts.sort_unstable();
        texts.dedup();
        let most = texts.len() > LITERALS_MAX || texts.iter().any(|text| text.len() > LITERAL_BYTES_MAX);
        match texts.is_empty() || most {
            true if most => Err(refused(
                at,
                format_args!("lists too much: {LITERALS_MAX} values of {LITERAL_BYTES_MAX} bytes are the most"),
            )),
            true => Err(refused(at, "allows no value")),
            false => self.add(Node::Literals(texts), at),
        }
    }

    fn reference(&mut self, reference: &Value, at: &At<'_>) -> Result<NodeId, ParticipantError> {
        let pointer = reference.as_str().and_then(|reference| reference.strip_prefix('#'));
        let pointer = pointer.ok_or_else(|| refused(at, "`$ref` names no part of this schema, like #/$defs/name"))?;
        if let Some(&node) = self.named.get(pointer) {
            return Ok(node);
        }
        let root = self.root;
        let schema =
            root.pointer(pointer).ok_or_else(|| refused(at, format_args!("there is no #{}", shown(pointer))))?;
        // What it holds may refer to it.
        let place = self.reserve(at)?;
        self.named.insert(pointer.to_owned(), place);
        let node = self.compile(schema, &At::Pointer(pointer))?;
        if node == place {
            return Err(refused(at, format_args!("#{} is itself and nothing else", shown(pointer))));
        }
        self.nodes[usize::from(place)] = Some(Node::AnyOf(vec![node]));
        Ok(place)
    }
}

/// A property's name behind its first quotation mark.
fn written(name: &str) -> Vec<u8> {
    serde_json::to_vec(name).expect("a string can be written").split_off(1)
}

/// As [`written`], where it is not too long.
fn checked(name: &str, at: &At<'_>) -> Result<Vec<u8>, ParticipantError> {
    let written = written(name);
    match written.len() > LITERAL_BYTES_MAX {
        true => Err(refused(at, format_args!("has a name of more than {LITERAL_BYTES_MAX} bytes; give a shorter one"))),
        false => Ok(written),
    }
}

/// The types that a schema names, each once; none where it names none.
fn types<'a>(map: &'a Map<String, Value>, at: &At<'_>) -> Result<Vec<&'a str>, ParticipantError> {
    let names = match map.get("type") {
        None => return Ok(Vec::new()),
        Some(Value::Array(names)) if names.is_empty() => return Err(refused(at, "`type` is no list of names")),
        Some(Value::Array(names)) => &names[..],
        Some(name) => std::slice::from_ref(name),
    };
    let mut types = Vec::new();
    for name in names {
        let name = name.as_str().ok_or_else(|| refused(at, "`type` is no name, and no list of names"))?;
        if !TYPES.contains(&name) {
            return Err(refused(at, format_args!("there is no type `{}`", shown(name))));
        }
        if !types.contains(&name) {
            types.push(name);
        }
    }
    Ok(types)
}

/// A schema that names no type, but says what only one can have, means that one here.
fn implied(map: &Map<String, Value>) -> Option<&'static str> {
    ["object", "array", "string"].into_iter().find(|ty| keywords(ty).iter().any(|key| map.contains_key(*key)))
}

fn keywords(ty: &str) -> &'static [&'static str] {
    match ty {
        "object" => &["properties", "required", "additionalProperties"],
        "array" => &["items", "minItems", "maxItems"],
        "string" => &["minLength", "maxLength"],
        _ => &[],
    }
}

fn check_known(map: &Map<String, Value>, known: &[&str], at: &At<'_>) -> Result<(), ParticipantError> {
    let unknown = map.keys().find(|key| !REMARKS.contains(&key.as_str()) && !known.contains(&key.as_str()));
    match unknown {
        Some(key) => Err(refused(at, format_args!("`{}` is not supported here; leave it out", shown(key)))),
        None => Ok(()),
    }
}

fn counts(map: &Map<String, Value>, min: &str, max: &str, at: &At<'_>) -> Result<(u32, u32), ParticipantError> {
    let count = |key: &str| match map.get(key) {
        None => Ok(None),
        Some(value) => match value.as_u64().filter(|&count| count <= COUNT_MAX) {
            Some(count) => Ok(Some(count as u32)),
            None => Err(refused(at, format_args!("`{key}` is no whole number of 0 to {COUNT_MAX}"))),
        },
    };
    let (least, most) = (count(min)?.unwrap_or(0), count(max)?.unwrap_or(UNBOUNDED));
    match least <= most {
        true => Ok((least, most)),
        false => Err(refused(at, format_args!("`{min}` is larger than `{max}`"))),
    }
}

fn is_of(value: &Value, ty: &str) -> bool {
    match ty {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}
