//! Rows and keys of both stores.

#![no_main]

use coldspare_core::{codec, key};
use coldspare_scan::index::Row;
use coldspare_standby::{ManifestRow, PendingRow};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(row) = Row::decode(bytes) {
        assert_eq!(Row::decode(&row.encode()).expect("ours"), row);
    }
    if let Ok(row) = codec::decode::<ManifestRow>(bytes) {
        assert_eq!(codec::decode::<ManifestRow>(&codec::encode(&row)).expect("ours"), row);
    }
    if let Ok(row) = codec::decode::<PendingRow>(bytes) {
        assert_eq!(codec::decode::<PendingRow>(&codec::encode(&row)).expect("ours"), row);
    }
    if let Ok((root, path)) = key::decode(bytes) {
        assert_eq!(key::encode(root, &path), bytes);
    }
});
