//! Bytes as lower-case letters and digits that survive a chat window: base32 of RFC 4648, without padding.

use std::sync::LazyLock;

use data_encoding::{Encoding, Specification};

/// Encodes `bytes`.
pub(crate) fn encode(bytes: &[u8]) -> String {
    BASE32.encode(bytes)
}

/// Decodes `text`; `None` for anything that [`encode`] doesn't write, upper case and stray bits at the end included.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    BASE32.decode(text.as_bytes()).ok()
}

static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut specification = Specification::new();
    specification.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    specification.encoding().expect("32 different symbols are an encoding")
});
