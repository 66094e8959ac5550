//! Metadata values: the thirteen types of GGUF, and their exact conversions to and from Rust's.
//!
//! A value converts only to its own type: a `u64` where a `u32` belongs is the file's mistake, as it is in llama.cpp.

use super::Strings;

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Elements of one type; GGUF arrays do not nest.
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Strings),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// What a metadata key can be read as: a number, `bool`, `&str`, a slice such as `&[i32]`, or `&Strings`.
pub trait FromValue<'a>: Sized {
    const EXPECTED: &'static str;

    /// `None` if `value` is of another type.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl Value {
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
            Value::Array(array) => match array {
                Array::U8(_) => "array of u8",
                Array::I8(_) => "array of i8",
                Array::U16(_) => "array of u16",
                Array::I16(_) => "array of i16",
                Array::U32(_) => "array of u32",
                Array::I32(_) => "array of i32",
                Array::F32(_) => "array of f32",
                Array::Bool(_) => "array of bool",
                Array::String(_) => "array of string",
                Array::U64(_) => "array of u64",
                Array::I64(_) => "array of i64",
                Array::F64(_) => "array of f64",
            },
        }
    }
}

macro_rules! conversions {
    ($($variant:ident $scalar:ty, $name:literal, $array_name:literal;)*) => {$(
        impl From<$scalar> for Value {
            fn from(value: $scalar) -> Value {
                Value::$variant(value)
            }
        }

        impl From<Vec<$scalar>> for Value {
            fn from(elements: Vec<$scalar>) -> Value {
                Value::Array(Array::$variant(elements))
            }
        }

        impl FromValue<'_> for $scalar {
            const EXPECTED: &'static str = $name;

            fn from_value(value: &Value) -> Option<$scalar> {
                if let Value::$variant(value) = value { Some(value.clone()) } else { None }
            }
        }

        impl<'a> FromValue<'a> for &'a [$scalar] {
            const EXPECTED: &'static str = $array_name;

            fn from_value(value: &'a Value) -> Option<&'a [$scalar]> {
                if let Value::Array(Array::$variant(elements)) = value { Some(elements) } else { None }
            }
        }
    )*};
}

conversions! {
    U8 u8, "u8", "array of u8";
    I8 i8, "i8", "array of i8";
    U16 u16, "u16", "array of u16";
    I16 i16, "i16", "array of i16";
    U32 u32, "u32", "array of u32";
    I32 i32, "i32", "array of i32";
    F32 f32, "f32", "array of f32";
    Bool bool, "bool", "array of bool";
    U64 u64, "u64", "array of u64";
    I64 i64, "i64", "array of i64";
    F64 f64, "f64", "array of f64";
}

impl From<String> for Value {
    fn from(value: String) -> Value {
        Value::String(value)
    }
}

impl From<Vec<String>> for Value {
    fn from(elements: Vec<String>) -> Value {
        Value::Array(Array::String(elements.into_iter().collect()))
    }
}

impl FromValue<'_> for String {
    const EXPECTED: &'static str = "string";

    fn from_value(value: &Value) -> Option<String> {
        if let Value::String(value) = value { Some(value.clone()) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a Strings {
    const EXPECTED: &'static str = "array of string";

    fn from_value(value: &'a Value) -> Option<&'a Strings> {
        if let Value::Array(Array::String(elements)) = value { Some(elements) } else { None }
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Value {
        Value::String(value.to_owned())
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "string";

    fn from_value(value: &'a Value) -> Option<&'a str> {
        if let Value::String(value) = value { Some(value) } else { None }
    }
}
