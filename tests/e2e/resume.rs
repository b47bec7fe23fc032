//! A large file that is cut off goes on where it was: what arrived isn't sent again, whoever was killed.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use crate::pair::{Host, Pair, until};
use crate::relay::Relay;
use crate::seed::{Seed, number_from_env};

/// The file that is sent, unless `COLDSPARE_RESUME_MIB` says more.
const MIB: u64 = 96;
/// What is sent of it, at least, before it is cut off.
const CUT_MIB: u64 = 24;
/// How long it takes at the limit of the link: wherever it is cut off, it isn't over.
const SECONDS: u64 = 12;
/// What travels besides content: names, digests, a segment that was under way at each of a few places.
const SLACK_BYTES: u64 = 3 << 20;

/// The unfinished file of the standby, and how many bytes of it are on its disk.
fn unfinished(standby: &Host) -> Option<(PathBuf, u64)> {
    let listed = ["f", "b"].into_iter().filter_map(|dir| fs::read_dir(standby.home.join(".coldspare/stage").join(dir)).ok());
    let path =
        listed.flatten().map(|entry| entry.unwrap().path()).find(|path| path.file_name().unwrap().to_string_lossy().starts_with("u-"))?;
    let blocks = fs::metadata(&path).ok()?.blocks();
    Some((path, blocks * 512))
}

struct Interrupted {
    pair: Pair,
    relay: Relay,
    size: u64,
}

impl Interrupted {
    /// A pair that has begun to send a large file, a part of which arrived.
    fn begin() -> Interrupted {
        let mut pair = Pair::new();
        let relay = Relay::new(pair.port, &mut Seed::from_env());
        relay.lead(&pair.active, pair.port);
        relay.weather.delay_ms.store(10, Ordering::Relaxed);
        let size = number_from_env("COLDSPARE_RESUME_MIB").unwrap_or(MIB) << 20;
        pair.active.configure(&format!("[link]\nbandwidth = \"{} kB/s\"\n", size / SECONDS / 1000));
        pair.standby.start();
        pair.active.start();
        pair.active.write("shared/small", "first");
        pair.checkpoint();
        // At once: one that grows while it is read is begun more than once.
        let outside = pair.dir.path().join("large");
        fs::write(&outside, Seed::new(5).noise(size as usize)).unwrap();
        fs::rename(&outside, pair.active.home.join("shared/large")).unwrap();
        let interrupted = Interrupted { pair, relay, size };
        interrupted.wait_for(CUT_MIB << 20);
        interrupted
    }

    fn wait_for(&self, bytes: u64) {
        until("a part arrived", || unfinished(&self.pair.standby).is_some_and(|(_, there)| there >= bytes));
    }

    /// Lets the file go on to its end; returns what was sent for that.
    fn go_on(&self) -> u64 {
        let sent = || self.pair.active.status()["bytes_sent"].as_u64().unwrap();
        let before = sent();
        self.relay.cut(false);
        self.pair.checkpoint();
        self.pair.assert_equal();
        let sent = sent() - before;
        // The standby is told that it is over after the checkpoint.
        until("nothing unfinished is left", || unfinished(&self.pair.standby).is_none());
        sent
    }

    fn lose_the_link(&self) {
        self.relay.cut(true);
        until("the link is seen to be cut", || self.pair.active.status()["connected"] == false);
        until("the standby sees it too", || self.pair.standby.status()["connected"] == false);
    }

    fn held(&self) -> u64 {
        unfinished(&self.pair.standby).expect("it is kept").1
    }

    #[track_caller]
    fn assert_sent(&self, sent: u64, held: u64) {
        let size = self.size;
        println!("{held} of {size} bytes were there, {sent} were sent");
        // Datagrams have headers.
        assert!(sent <= (size - held) * 21 / 20 + SLACK_BYTES, "{sent} bytes were sent although {held} of {size} were there");
    }
}

#[test]
fn a_cut_link_costs_what_was_under_way() {
    let at = Interrupted::begin();
    at.lose_the_link();
    let first = at.held();
    at.relay.cut(false);
    at.wait_for(first + (CUT_MIB << 20));
    at.lose_the_link();
    let second = at.held();
    assert!(second > first, "{second} bytes are there after {first} were");
    let sent = at.go_on();
    at.assert_sent(sent, second);
}

#[test]
fn a_killed_receiver_costs_what_was_under_way() {
    let mut at = Interrupted::begin();
    at.pair.standby.kill();
    until("the link is seen to be gone", || at.pair.active.status()["connected"] == false);
    let held = at.held();
    at.relay.cut(true);
    at.pair.standby.start();
    let sent = at.go_on();
    at.assert_sent(sent, held);
}

#[test]
fn a_killed_sender_costs_what_was_under_way() {
    let mut at = Interrupted::begin();
    at.pair.active.kill();
    until("the link is seen to be gone", || at.pair.standby.status()["connected"] == false);
    let held = at.held();
    at.relay.cut(true);
    at.pair.active.start();
    let sent = at.go_on();
    at.assert_sent(sent, held);
}

#[test]
fn what_was_left_and_is_damaged_is_sent_again() {
    let mut at = Interrupted::begin();
    at.lose_the_link();
    at.pair.standby.kill();
    let (path, held) = unfinished(&at.pair.standby).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0x55; 100], 5 << 20).unwrap(); // within one block
    at.pair.standby.start();
    let sent = at.go_on();
    at.assert_sent(sent, held);
}

#[test]
fn a_file_that_became_another_meanwhile_is_that_one() {
    let at = Interrupted::begin();
    at.lose_the_link();
    // Shorter, with holes, and the same only in part.
    let mut content = fs::read(at.pair.active.home.join("shared/large")).unwrap();
    content.truncate(20 << 20);
    content[(2 << 20)..(6 << 20)].fill(0);
    at.pair.active.write("shared/large", &content);
    at.go_on();
    assert!(fs::read(at.pair.standby.home.join("shared/large")).unwrap() == content);
}
