//! Slots of the control file: torn, foreign, or with a digest that fits and a value that doesn't.

#![no_main]

use coldspare_core::control::ControlRecord;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    check(&sealed(bytes));
});

fn check(slot: &[u8]) {
    if let Some((slot_seq, record)) = ControlRecord::decode_slot(slot) {
        let again = record.encode_slot(slot_seq);
        assert_eq!(ControlRecord::decode_slot(&again), Some((slot_seq, record)));
    }
}

/// A slot around `value` whose digest is right: chance never finds one.
fn sealed(value: &[u8]) -> Vec<u8> {
    let len = u32::try_from(value.len()).expect("inputs are small");
    let mut slot = b"csctrl\0\x01".to_vec();
    slot.extend(7u64.to_le_bytes());
    slot.extend(len.to_le_bytes());
    slot.extend(value);
    let digest = coldspare_delta::digest(&slot);
    slot.extend(digest);
    slot
}
