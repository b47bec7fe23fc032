//! Operations, entries and paths from a peer: whatever decodes survives a round trip, and checking it never panics.

#![no_main]

use std::fmt::Debug;

use coldspare_core::{Entry, Op, RelPath, codec};
use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};

fuzz_target!(|bytes: &[u8]| {
    if let Some(op) = round_trip::<Op>(bytes) {
        let _ = op.check(4);
        check_path(op.path());
    }
    if let Some(entry) = round_trip::<Entry>(bytes) {
        let _ = entry.check(&RelPath::root());
    }
    if let Some(path) = round_trip::<RelPath>(bytes) {
        check_path(&path);
    }
    if let Ok(path) = RelPath::new(bytes) {
        assert_eq!(path.as_bytes(), bytes);
        check_path(&path);
    }
});

/// Decodes; a number may have been coded in more bytes than it needs, so values are compared and not bytes.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let value: T = codec::decode(bytes).ok()?;
    let again: T = codec::decode(&codec::encode(&value)).expect("what was encoded decodes");
    assert_eq!(value, again);
    Some(value)
}

/// A path can't lead out of its root, nor into coldspare's own folder.
fn check_path(path: &RelPath) {
    let components: Vec<&[u8]> = path.components().collect();
    assert_eq!(components.join(&b'/'), path.as_bytes());
    assert_ne!(components.first(), Some(&coldspare_core::path::CONTROL_DIR));
    for component in components {
        assert!(!component.is_empty() && component.len() <= 255);
        assert!(component != b"." && component != b".." && !component.contains(&0));
    }
}
