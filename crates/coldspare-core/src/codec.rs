//! The one place where values become bytes and back: bincode, varint encoding, little-endian.
//!
//! Invariants: decoding is limited before anything is allocated, and left-over bytes are an error.

use std::fmt;
use std::marker::PhantomData;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use serde::de::{DeserializeOwned, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// LIMIT: bytes of one encoded value, on the wire and in a store, and of what decoding it may allocate at once.
pub const VALUE_BYTES_MAX: usize = 8 << 20;

type Config = Configuration<LittleEndian, Varint, Limit<VALUE_BYTES_MAX>>;

fn config() -> Config {
    bincode::config::standard().with_limit::<VALUE_BYTES_MAX>()
}

/// Why bytes are not the value that was expected.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The bytes break off, are over the limit, or hold something that the type refuses.
    #[error("malformed value: {0}")]
    Malformed(String),
    /// The value is complete but bytes follow it.
    #[error("{0} bytes follow a complete value")]
    Trailing(usize),
}

/// Encodes `value`.
///
/// # Panics
/// When `value` itself is over [`VALUE_BYTES_MAX`] or can't be encoded at all: callers bound what they build.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let bytes = bincode::serde::encode_to_vec(value, config()).expect("values of this project can be encoded");
    assert!(bytes.len() <= VALUE_BYTES_MAX, "a value of {} bytes is over the limit", bytes.len());
    bytes
}

/// Decodes one value from all of `bytes`.
///
/// # Errors
/// [`DecodeError`]: anything but exactly one value. Nothing above [`VALUE_BYTES_MAX`] is allocated.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config()).map_err(|e| DecodeError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(DecodeError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

/// Decodes one value from the start of `bytes`; with it, what follows.
///
/// # Errors
/// [`DecodeError::Malformed`].
pub fn decode_first<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config()).map_err(|e| DecodeError::Malformed(e.to_string()))?;
    Ok((value, &bytes[used..]))
}

/// Reads a list of at most `MAX` elements and fails at the first beyond, whatever length was announced.
///
/// For `#[serde(deserialize_with = …)]`.
///
/// # Errors
/// As the deserializer, and for a list that is too long.
pub fn capped<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Capped<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Capped<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MAX}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = seq.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::custom(format_args!("a list of more than {MAX}")));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(Capped::<T, MAX>(PhantomData))
}

/// Byte strings as byte strings, not as sequences of numbers; for `#[serde(with = …)]`.
pub mod bytes {
    use std::fmt;

    use serde::de::{Error, SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    /// Writes `bytes`.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    /// Reads a byte string.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_byte_buf(BytesVisitor)
    }

    struct BytesVisitor;

    impl<'de> Visitor<'de> for BytesVisitor {
        type Value = Vec<u8>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a byte string")
        }

        fn visit_bytes<E: Error>(self, v: &[u8]) -> Result<Vec<u8>, E> {
            Ok(v.to_vec())
        }

        fn visit_byte_buf<E: Error>(self, v: Vec<u8>) -> Result<Vec<u8>, E> {
            Ok(v)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u8>, A::Error> {
            let mut out = Vec::new();
            while let Some(b) = seq.next_element()? {
                out.push(b);
            }
            Ok(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_lies_allocates_nothing() {
        // A byte string that claims 2^40 bytes.
        let mut bytes = vec![253];
        bytes.extend_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(matches!(decode::<crate::RelPath>(&bytes), Err(DecodeError::Malformed(_))));
        assert!(matches!(decode::<Vec<u64>>(&bytes), Err(DecodeError::Malformed(_))));
    }

    #[test]
    fn left_over_bytes_are_an_error() {
        let mut bytes = encode(&7u32);
        assert_eq!(decode::<u32>(&bytes).unwrap(), 7);
        bytes.push(0);
        assert!(matches!(decode::<u32>(&bytes), Err(DecodeError::Trailing(1))));
    }
}
