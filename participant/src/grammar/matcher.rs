//! Where an answer stands in a grammar.
//!
//! A *stack* holds what is still to come, the next on top; a *set* holds the stacks of all ways to read what has come. Sets
//! are numbered and their steps are remembered, so that trying all tokens of a vocabulary is mostly looking up bytes.

use std::collections::HashMap;
use std::sync::Arc;

use super::schema::{Grammar, Node, NodeId, Object, UNBOUNDED};

pub struct Matcher {
    grammar: Arc<Grammar>,
    sets: Vec<Set>,
    numbers: HashMap<Vec<Stack>, SetId>,
    /// Of all sets.
    frames: usize,
    now: SetId,
}

/// A place in [`Matcher::sets`].
pub(super) type SetId = u32;
/// No way is left to read the text.
pub(super) const DEAD: SetId = SetId::MAX - 1;
/// More ways are left than are followed. What comes behind is not known: it may be wrong.
pub(super) const LOST: SetId = SetId::MAX - 2;
const UNKNOWN: SetId = SetId::MAX;

struct Set {
    /// Sorted, none twice; with nothing left to come, a stack is empty.
    stacks: Vec<Stack>,
    next: Box<[SetId; 256]>,
}

type Stack = Vec<Frame>;

/// What is to come. White space is allowed where JSON allows it within a value, but only so much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Frame {
    /// At most so many white characters.
    Gap(u8),
    Value(NodeId),
    /// One of the literals of this range, of which so many bytes have come.
    Literal {
        node: NodeId,
        low: u16,
        high: u16,
        at: u16,
    },
    /// The rest of a string: how many characters at least and at most.
    Text {
        at: TextAt,
        min: u32,
        max: u32,
    },
    Number {
        at: NumberAt,
        left: u8,
        whole: bool,
    },
    ArrayBegun(NodeId),
    /// Behind an item, of which so many have come.
    Items(NodeId, u32),
    ObjectBegun(NodeId),
    /// Behind a member; bits of the names that have come.
    Members(NodeId, u64),
    /// Behind a comma.
    Member(NodeId, u64),
    /// One of the names of this range, of which so many bytes have come.
    Name {
        node: NodeId,
        seen: u64,
        low: u8,
        high: u8,
        at: u16,
    },
    /// A name that is none of the schema's; those of this range begin as it does so far.
    OtherName {
        node: NodeId,
        seen: u64,
        low: u8,
        high: u8,
        at: u16,
        character: Character,
    },
    Colon,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum TextAt {
    Character(Character),
    Escape,
    /// So many hexadecimal digits to come; whether the first was a D, behind which surrogates lie.
    Hex(u8, bool),
}

/// Within a character of UTF-8: how many bytes are to come, and the bounds of the next (Unicode 16, table 3-7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Character {
    left: u8,
    low: u8,
    high: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum NumberAt {
    Minus,
    Zero,
    Whole,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

const GAP: Frame = Frame::Gap(24);
/// Digits of a number before its point, behind it, and of its power: all of them together are a number in f64.
const DIGITS: u8 = 15;
const POWER_DIGITS: u8 = 2;
/// Some sixty values within each other: parsers refuse deeper ones.
const STACK_MAX: usize = 192;
/// Ways to read a text that are followed. One of as many alternatives as a schema may have needs two at most: an object's name
/// is one of those it knows, or not.
const STACKS_MAX: usize = 256;
/// Sets that are remembered between tokens, and at most while one is looked for; and the frames in them.
const SETS_KEPT: usize = 1024;
const SETS_MAX: usize = 16384;
const FRAMES_KEPT: usize = 1 << 18;
const FRAMES_MAX: usize = 1 << 20;

const BETWEEN: Character = Character { left: 0, low: 0, high: 0 };

impl Character {
    /// Behind one more byte, which belongs to a character that has begun or begins one.
    fn next(self, byte: u8) -> Option<Self> {
        if self.left > 0 {
            let next = Self { left: self.left - 1, low: 0x80, high: 0xbf };
            return (self.low..=self.high).contains(&byte).then_some(if next.left == 0 { BETWEEN } else { next });
        }
        let (left, low, high) = match byte {
            0x20..=0x7f => return Some(BETWEEN),
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            _ => return None,
        };
        Some(Self { left, low, high })
    }
}

impl Matcher {
    pub fn new(grammar: Arc<Grammar>) -> Self {
        let mut matcher = Self { grammar, sets: Vec::new(), numbers: HashMap::new(), frames: 0, now: DEAD };
        matcher.now = matcher.number(vec![vec![Frame::Value(0), GAP]]);
        matcher
    }

    /// Takes a part of the answer; whether it may go on like this, or end. No as well where it can be read in more ways than are
    /// followed, and nobody knows.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        if self.sets.len() > SETS_KEPT || self.frames > FRAMES_KEPT {
            let stacks = self.stacks(self.now).to_vec();
            self.sets.clear();
            self.numbers.clear();
            self.frames = 0;
            self.now = self.number(stacks);
        }
        self.now = bytes.iter().fold(self.now, |set, &byte| self.step(set, byte));
        !matches!(self.now, DEAD | LOST)
    }

    /// Whether what has come is whole.
    pub fn may_end(&self) -> bool {
        let whole = |frame: &Frame| match frame {
            Frame::Gap(_) => true,
            Frame::Number { at, .. } => at.is_whole(),
            _ => false,
        };
        self.stacks(self.now).iter().any(|stack| stack.iter().all(whole))
    }

    /// Whether nothing may follow.
    pub fn is_over(&self) -> bool {
        self.stacks(self.now).iter().all(Vec::is_empty)
    }

    pub(super) fn now(&self) -> SetId {
        self.now
    }

    fn stacks(&self, set: SetId) -> &[Stack] {
        self.sets.get(set as usize).map_or(&[], |set| &set.stacks)
    }

    /// Behind one more byte.
    pub(super) fn step(&mut self, set: SetId, byte: u8) -> SetId {
        let Some(found) = self.sets.get(set as usize).map(|set| set.next[usize::from(byte)]) else { return set };
        if found != UNKNOWN {
            return found;
        }
        let mut next = Vec::new();
        for stack in self.stacks(set) {
            self.grammar.advance(stack, byte, &mut next);
            if next.len() > 4 * STACKS_MAX {
                next.sort_unstable();
                next.dedup();
                if next.len() > STACKS_MAX {
                    break;
                }
            }
        }
        let next = self.number(next);
        self.sets[set as usize].next[usize::from(byte)] = next;
        next
    }

    fn number(&mut self, mut stacks: Vec<Stack>) -> SetId {
        stacks.sort_unstable();
        stacks.dedup();
        if stacks.is_empty() {
            return DEAD;
        }
        if let Some(&known) = self.numbers.get(&stacks) {
            return known;
        }
        if stacks.len() > STACKS_MAX || self.sets.len() >= SETS_MAX || self.frames >= FRAMES_MAX {
            return LOST;
        }
        self.frames += stacks.iter().map(Vec::len).sum::<usize>();
        let number = self.sets.len() as SetId;
        self.numbers.insert(stacks.clone(), number);
        self.sets.push(Set { stacks, next: Box::new([UNKNOWN; 256]) });
        number
    }
}

impl NumberAt {
    fn is_whole(self) -> bool {
        matches!(self, Self::Zero | Self::Whole | Self::Fraction | Self::Power)
    }
}

impl Grammar {
    /// Adds to `out` what a stack becomes behind one more byte: nothing where it does not allow it.
    fn advance(&self, stack: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        let Some((&top, rest)) = stack.split_last() else { return };
        let with = |frames: &[Frame]| [rest, frames].concat();
        match top {
            Frame::Gap(left) if matches!(byte, b' ' | b'\n' | b'\t' | b'\r') => {
                if left > 0 {
                    out.push(with(&[Frame::Gap(left - 1)]));
                }
            }
            Frame::Gap(_) => self.advance(rest, byte, out),
            Frame::Value(node) => self.begin(node, rest, byte, out),
            Frame::Literal { node, low, high, at } => self.literal(node, [low, high], at, rest, byte, out),
            Frame::Text { at, min, max } => text(at, [min, max], rest, byte, out),
            // Many a program reads this as a fraction.
            Frame::Number { at: NumberAt::Minus, whole: true, .. } if byte == b'0' => {}
            Frame::Number { at, left, whole } => match number(at, left, whole, byte) {
                Some((at, left)) => out.push(with(&[Frame::Number { at, left, whole }])),
                // Where a number ends, only what follows it tells.
                None if at.is_whole() => self.advance(rest, byte, out),
                None => {}
            },
            Frame::ArrayBegun(node) => {
                let &Node::Array { items, min, max } = self.node(node) else { return };
                match byte {
                    b']' if min == 0 => out.push(rest.to_vec()),
                    b']' => {}
                    _ if max == 0 => {}
                    _ => self.begin(items, &with(&[Frame::Items(node, 1), GAP]), byte, out),
                }
            }
            Frame::Items(node, count) => {
                let &Node::Array { items, min, max } = self.node(node) else { return };
                match byte {
                    b']' if count >= min => out.push(rest.to_vec()),
                    b',' if count < max => {
                        // Counting ends where nobody asks any more, so that long arrays have few states.
                        let count = if max == UNBOUNDED { (count + 1).min(min.max(1)) } else { count + 1 };
                        out.push(with(&[Frame::Items(node, count), GAP, Frame::Value(items), GAP]));
                    }
                    _ => {}
                }
            }
            Frame::ObjectBegun(node) => match byte {
                b'}' if self.object_at(node).required == 0 => out.push(rest.to_vec()),
                b'"' => self.name_begun(node, 0, rest, out),
                _ => {}
            },
            Frame::Members(node, seen) => {
                let object = self.object_at(node);
                match byte {
                    b'}' if object.required & !seen == 0 => out.push(rest.to_vec()),
                    b',' if object.others.is_some() || object.has_left(seen, 0..object.names.len()) => {
                        out.push(with(&[Frame::Member(node, seen), GAP]));
                    }
                    _ => {}
                }
            }
            Frame::Member(node, seen) if byte == b'"' => self.name_begun(node, seen, rest, out),
            Frame::Name { .. } => self.name(top, rest, byte, out),
            Frame::OtherName { .. } => self.other_name(top, rest, byte, out),
            Frame::Colon if byte == b':' => out.push(rest.to_vec()),
            Frame::Member(..) | Frame::Colon => {}
        }
    }

    fn node(&self, node: NodeId) -> &Node {
        &self.nodes[usize::from(node)]
    }

    fn object_at(&self, node: NodeId) -> &Object {
        match self.node(node) {
            Node::Object(object) => object,
            _ => unreachable!("frames of objects name objects"),
        }
    }

    /// The first byte of a value, on top of `rest`.
    fn begin(&self, node: NodeId, rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        match self.node(node) {
            Node::AnyOf(kinds) => kinds.iter().for_each(|&kind| self.begin_one(kind, rest, byte, out)),
            _ => self.begin_one(node, rest, byte, out),
        }
    }

    /// As [`begin`](Self::begin), of a node that is no alternative of others.
    fn begin_one(&self, node: NodeId, rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        let mut add = |frames: &[Frame]| out.push([rest, frames].concat());
        match (self.node(node), byte) {
            (Node::Literals(all), _) => self.literal(node, [0, all.len() as u16], 0, rest, byte, out),
            (&Node::String { min, max }, b'"') => {
                add(&[Frame::Text { at: TextAt::Character(BETWEEN), min, max }]);
            }
            (&Node::Number { whole }, b'-') => add(&[Frame::Number { at: NumberAt::Minus, left: DIGITS, whole }]),
            (&Node::Number { whole }, _) => {
                if let Some((at, left)) = number(NumberAt::Minus, DIGITS, whole, byte) {
                    add(&[Frame::Number { at, left, whole }]);
                }
            }
            (Node::Array { .. }, b'[') if rest.len() < STACK_MAX => add(&[Frame::ArrayBegun(node), GAP]),
            (Node::Object(_), b'{') if rest.len() < STACK_MAX => add(&[Frame::ObjectBegun(node), GAP]),
            _ => {}
        }
    }

    fn literal(&self, node: NodeId, [low, high]: [u16; 2], at: u16, rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        let Node::Literals(all) = self.node(node) else { return };
        let (low, high) = narrowed(all, |text| text, [low.into(), high.into()], at.into(), byte);
        let at = at + 1;
        // Of those that begin alike, the one that ends here is the first.
        let ends = low < high && all[low].len() == usize::from(at);
        if ends {
            out.push(rest.to_vec());
        }
        let low = low + usize::from(ends);
        if low < high {
            out.push([rest, &[Frame::Literal { node, low: low as u16, high: high as u16, at }]].concat());
        }
    }

    fn name_begun(&self, node: NodeId, seen: u64, rest: &[Frame], out: &mut Vec<Stack>) {
        let object = self.object_at(node);
        let high = object.names.len() as u8;
        if object.has_left(seen, 0..object.names.len()) {
            out.push([rest, &[Frame::Name { node, seen, low: 0, high, at: 0 }]].concat());
        }
        if object.others.is_some() {
            let other = Frame::OtherName { node, seen, low: 0, high, at: 0, character: BETWEEN };
            out.push([rest, &[other]].concat());
        }
    }

    fn name(&self, frame: Frame, rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        let Frame::Name { node, seen, low, high, at } = frame else { return };
        let object = self.object_at(node);
        let (low, high) = narrowed(&object.names, |(name, _)| name, [low.into(), high.into()], at.into(), byte);
        if !object.has_left(seen, low..high) {
            return;
        }
        let (name, value) = &object.names[low];
        // A name ends with its quotation mark, which no other has within it.
        if name.len() == usize::from(at) + 1 {
            out.push(member(node, seen | 1 << low, *value, rest));
        } else {
            let name = Frame::Name { node, seen, low: low as u8, high: high as u8, at: at + 1 };
            out.push([rest, &[name]].concat());
        }
    }

    fn other_name(&self, frame: Frame, rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
        let Frame::OtherName { node, seen, low, high, at, character } = frame else { return };
        let object = self.object_at(node);
        let (low, high) = narrowed(&object.names, |(name, _)| name, [low.into(), high.into()], at.into(), byte);
        match byte {
            b'"' if character == BETWEEN => {
                // It would be the schema's own.
                if low == high {
                    let others = object.others.expect("other names where there may be some");
                    out.push(member(node, seen, others, rest));
                }
            }
            // An escape may spell what is the schema's own.
            b'\\' => {}
            _ => {
                if let Some(character) = character.next(byte) {
                    let (low, high, at) = if low == high { (0, 0, 0) } else { (low as u8, high as u8, at + 1) };
                    out.push([rest, &[Frame::OtherName { node, seen, low, high, at, character }]].concat());
                }
            }
        }
    }
}

impl Object {
    /// Whether one of these names has not come.
    fn has_left(&self, seen: u64, mut names: std::ops::Range<usize>) -> bool {
        names.any(|name| seen & 1 << name == 0)
    }
}

/// Behind a name.
fn member(node: NodeId, seen: u64, value: NodeId, rest: &[Frame]) -> Stack {
    [rest, &[Frame::Members(node, seen), GAP, Frame::Value(value), GAP, Frame::Colon, GAP]].concat()
}

/// Of texts that are sorted and in this range alike up to `at`, those with this byte there.
fn narrowed<T>(
    all: &[T],
    text: impl Fn(&T) -> &Vec<u8>,
    [low, high]: [usize; 2],
    at: usize,
    byte: u8,
) -> (usize, usize) {
    let range = &all[low..high];
    let byte = Some(byte);
    let begin = range.partition_point(|item| text(item).get(at).copied() < byte);
    let end = range.partition_point(|item| text(item).get(at).copied() <= byte);
    (low + begin, low + end)
}

fn text(at: TextAt, [min, max]: [u32; 2], rest: &[Frame], byte: u8, out: &mut Vec<Stack>) {
    let mut add = |at: TextAt, min: u32, max: u32| out.push([rest, &[Frame::Text { at, min, max }]].concat());
    let counted = || Some((min.saturating_sub(1), if max == UNBOUNDED { max } else { max.checked_sub(1)? }));
    match at {
        TextAt::Character(character) if character.left > 0 => {
            if let Some(next) = character.next(byte) {
                add(TextAt::Character(next), min, max);
            }
        }
        TextAt::Character(_) => match byte {
            b'"' if min == 0 => out.push(rest.to_vec()),
            b'"' => {}
            b'\\' if max > 0 => add(TextAt::Escape, min, max),
            _ => {
                if let (Some(next), Some((min, max))) = (BETWEEN.next(byte).filter(|_| byte != b'\\'), counted()) {
                    add(TextAt::Character(next), min, max);
                }
            }
        },
        TextAt::Escape => match byte {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                if let Some((min, max)) = counted() {
                    add(TextAt::Character(BETWEEN), min, max);
                }
            }
            b'u' => add(TextAt::Hex(4, false), min, max),
            _ => {}
        },
        TextAt::Hex(left, behind_d) => {
            let allowed = if behind_d { matches!(byte, b'0'..=b'7') } else { byte.is_ascii_hexdigit() };
            match (allowed, left, counted()) {
                (true, 1, Some((min, max))) => add(TextAt::Character(BETWEEN), min, max),
                (true, 2.., _) => add(TextAt::Hex(left - 1, left == 4 && matches!(byte, b'd' | b'D')), min, max),
                _ => {}
            }
        }
    }
}

/// A number behind one more byte, and how many digits may follow; none where it does not go on.
fn number(at: NumberAt, left: u8, whole: bool, byte: u8) -> Option<(NumberAt, u8)> {
    use NumberAt::{Exponent, Fraction, Minus, Point, Power, Sign, Whole, Zero};
    match (at, byte) {
        (Minus, b'0') => Some((Zero, 0)),
        (Minus, b'1'..=b'9') => Some((Whole, DIGITS - 1)),
        (Whole, b'0'..=b'9') if left > 0 => Some((Whole, left - 1)),
        (Zero | Whole, b'.') if !whole => Some((Point, DIGITS)),
        (Point, b'0'..=b'9') => Some((Fraction, DIGITS - 1)),
        (Fraction, b'0'..=b'9') if left > 0 => Some((Fraction, left - 1)),
        (Zero | Whole | Fraction, b'e' | b'E') if !whole => Some((Exponent, POWER_DIGITS)),
        (Exponent, b'+' | b'-') => Some((Sign, POWER_DIGITS)),
        (Exponent | Sign, b'0'..=b'9') => Some((Power, POWER_DIGITS - 1)),
        (Power, b'0'..=b'9') if left > 0 => Some((Power, left - 1)),
        _ => None,
    }
}
