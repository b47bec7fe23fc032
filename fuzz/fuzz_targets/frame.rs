//! Frames of both kinds of streams, as they arrive in pieces: limits kept, and what was decoded encodes to the same.

#![no_main]

use coldspare_core::codec;
use coldspare_transport::frame::{Assembly, Kind};
use coldspare_transport::message::{decode_control, decode_data};
use coldspare_transport::{ToActive, ToStandby};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, Vec<u8>)| {
    let (choice, bytes) = input;
    let kind = [Kind::ToStandby, Kind::ToActive, Kind::Data][usize::from(choice % 3)];
    let mut assembly = Assembly::new(kind);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let space = assembly.space();
        let count = space.len().min(rest.len());
        if count == 0 {
            return;
        }
        space[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        if assembly.advance(count).is_err() {
            break;
        }
        while let Some(frame) = assembly.take() {
            message(kind, &frame.body, frame.payload.len() as u64);
        }
    }
    // Bodies are seldom reached through a header made by chance.
    message(kind, &bytes, u64::from(choice));
});

fn message(kind: Kind, body: &[u8], payload_bytes: u64) {
    match kind {
        Kind::ToStandby => {
            if let Ok(message) = decode_control::<ToStandby>(body) {
                assert_eq!(decode_control::<ToStandby>(&codec::encode(&message)).expect("ours"), message);
            }
        }
        Kind::ToActive => {
            if let Ok(message) = decode_control::<ToActive>(body) {
                assert_eq!(decode_control::<ToActive>(&codec::encode(&message)).expect("ours"), message);
            }
        }
        Kind::Data => {
            if let Ok(data) = decode_data(body, payload_bytes) {
                assert_eq!(decode_data(&codec::encode(&data), payload_bytes).expect("ours"), data);
            }
        }
    }
}
