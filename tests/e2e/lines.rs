//! The pair at the two ends of a line that is emulated packet by packet: its rate, its length, its losses, its outages.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use coldspare_sim::line::{FAR, Line, Quality};

use crate::git::{self, commit, push};
use crate::pair::{Pair, until};
use crate::seed::{Seed, number_from_env};

/// How often the line goes and comes back, unless `COLDSPARE_FLAPS` says more.
const FLAPS: u64 = 3;
/// How long it is there, and how long it isn't.
const FLAP: Duration = Duration::from_secs(5);

/// `None`, said so, where no line can be made.
fn line(quality: Quality) -> Option<Line> {
    if !Line::is_possible() {
        println!("skipped: needs root and /dev/net/tun");
        return None;
    }
    let mut seed = Seed::from_env();
    Some(Line::new(quality, seed.next()).unwrap())
}

/// A repository and some noise are seeded, then a push follows; returns the seconds of the seed and of the push.
fn seed_and_follow(pair: &mut Pair, noise_bytes: usize) -> (f64, f64) {
    let (here, clone) = (pair.active.home.join("shared/data/repositories/1"), pair.dir.path().join("clone"));
    git::init_bare(&here);
    git::clone(&here, &clone);
    commit(&clone, "file", "pushed");
    push(&clone, &["HEAD:main"]);
    pair.active.write("shared/noise", Seed::new(3).noise(noise_bytes));
    pair.standby.start();
    let start = Instant::now();
    pair.active.start();
    pair.checkpoint();
    let seeded = start.elapsed().as_secs_f64();
    pair.assert_equal();
    commit(&clone, "file", "pushed again");
    push(&clone, &["HEAD:main"]);
    let start = Instant::now();
    pair.checkpoint();
    let followed = start.elapsed().as_secs_f64();
    pair.assert_equal();
    git::assert_clean(&pair.standby.home.join("shared/data/repositories/1"));
    (seeded, followed)
}

#[test]
fn one_percent_of_loss_over_50_ms_leaves_the_line_full() {
    let Some(line) = line(Quality { loss_ppm: 10_000, ..Quality::default() }) else { return };
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    let bytes = 40_000_000;
    let (seeded, followed) = seed_and_follow(&mut pair, bytes);
    let share = bytes as f64 * 8.0 / 100e6 / seeded;
    println!("seeded in {seeded:.2} s, {share:.2} of the line; a push in {followed:.2} s; {:?}", line.there());
    assert!(line.there().lost.load(Ordering::Relaxed) > 100);
}

/// Packets that were too long for a line of 1,280 bytes, of whose MTU the route says `route`.
fn too_long(route: &str) -> Option<u64> {
    let line = line(Quality { mtu: 1280, ..Quality::default() })?;
    let routed = line.near().enter(|| {
        let ip = |args: &[&str]| Command::new("ip").args(args).output();
        let found = String::from_utf8(ip(&["route", "show", "to", FAR])?.stdout).unwrap().replace("mtu 1280", route);
        Ok(ip(&[&["route", "replace"], found.split_whitespace().collect::<Vec<_>>().as_slice()].concat())?.status.success())
    });
    assert!(routed.unwrap());
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    let (seeded, followed) = seed_and_follow(&mut pair, 10_000_000);
    println!("seeded in {seeded:.2} s, a push in {followed:.2} s; {:?}", line.there());
    Some(line.there().too_long.load(Ordering::Relaxed))
}

#[test]
fn a_line_of_1280_bytes_is_found_out_whether_or_not_the_route_tells() {
    let Some(told) = too_long("mtu 1280") else { return };
    assert_eq!(told, 0, "packets were too long though the route says so");
    let untold = too_long("mtu 1500").unwrap();
    assert!((1..100).contains(&untold), "{untold} packets were too long");
}

#[test]
fn a_line_that_comes_and_goes_is_used_whenever_it_is_there() {
    let quality = Quality { bits_per_second: 40_000_000, ..Quality::default() };
    let Some(line) = line(quality.clone()) else { return };
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    let flaps = number_from_env("COLDSPARE_FLAPS").unwrap_or(FLAPS);
    // Fills all windows but one; the rest is sent once the line stays.
    let size = (flaps + 1) * FLAP.as_secs() * quality.bits_per_second / 8;
    let arrived = || line.there().arrived_bytes.load(Ordering::Relaxed);
    let before = arrived();
    // At once: one that grows while it is read is read, and sent, more than once.
    let outside = pair.dir.path().join("large");
    fs::write(&outside, Seed::new(5).noise(size as usize)).unwrap();
    fs::create_dir(pair.active.home.join("shared")).unwrap();
    fs::rename(&outside, pair.active.home.join("shared/large")).unwrap();
    until("it is under way", || arrived() - before > 1 << 20);
    let mut missed = 0;
    for flap in 1..=flaps {
        line.cut(true);
        std::thread::sleep(FLAP);
        let (at, back) = (arrived(), Instant::now());
        line.cut(false);
        until("the line is used again", || arrived() - at > 100_000);
        let used_after = back.elapsed();
        std::thread::sleep(FLAP.saturating_sub(used_after));
        let share = (arrived() - at) as f64 * 8.0 / quality.bits_per_second as f64 / back.elapsed().as_secs_f64();
        println!("outage {flap}: used after {used_after:.1?}, {share:.2} of the line until the next");
        missed += u64::from(used_after >= FLAP);
    }
    // Left to itself QUIC's next probe may be as far away as the outage was long; once this host may have stood still.
    assert!(missed <= 1, "nothing passed before the next outage, {missed} times of {flaps}");
    pair.checkpoint();
    pair.assert_equal();
    let passed = arrived() - before;
    println!("{passed} bytes passed for {size} of content, {:.3}", passed as f64 / size as f64);
    // Headers take 5 %; what was under way at each outage is at most a few round trips of it.
    let under_way = flaps * quality.bits_per_second / 8 / 4;
    assert!(passed < size * 106 / 100 + under_way + (1 << 20), "{passed} bytes passed for {size}");
}

/// `cargo test --test e2e lines:: -- --ignored --nocapture`
#[test]
#[ignore = "prints how long a small file takes while a large one travels"]
fn a_small_file_behind_a_large_one() {
    let Some(line) = line(Quality::default()) else { return };
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    pair.standby.start();
    pair.active.start();
    pair.checkpoint();
    let outside = pair.dir.path().join("large");
    fs::write(&outside, Seed::new(5).noise(60_000_000)).unwrap();
    fs::create_dir(pair.active.home.join("shared")).unwrap();
    let before = line.there().arrived_bytes.load(Ordering::Relaxed);
    fs::rename(&outside, pair.active.home.join("shared/large")).unwrap();
    until("it is under way", || line.there().arrived_bytes.load(Ordering::Relaxed) - before > 1 << 20);
    let start = Instant::now();
    pair.active.write("shared/small", "urgent");
    until("the small file is there", || pair.standby.home.join("shared/small").exists());
    println!("the small file took {:.2?}; the large one is there: {}", start.elapsed(), pair.standby.home.join("shared/large").exists());
}

/// `cargo test --test e2e lines:: -- --ignored --nocapture`
#[test]
#[ignore = "prints what a line gives to a seed and to a TCP transfer beside it"]
fn a_seed_beside_a_tcp_transfer() {
    let Some(line) = line(Quality::default()) else { return };
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    let bytes = 60_000_000;
    pair.active.write("shared/noise", Seed::new(3).noise(bytes));
    pair.standby.start();
    let (received, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let listener = line.far().enter(|| TcpListener::bind((FAR, 5001))).unwrap();
    let (count, is_over) = (received.clone(), ends.clone());
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            count.fetch_add(len as u64, Ordering::Relaxed);
        }
    });
    let mut stream = line.near().enter(|| TcpStream::connect((FAR, 5001))).unwrap();
    let sender = std::thread::spawn(move || {
        while !is_over.load(Ordering::Relaxed) {
            stream.write_all(&[7; 1 << 16]).unwrap();
        }
    });
    std::thread::sleep(Duration::from_secs(3)); // it has the line to itself
    let (before, start) = (received.load(Ordering::Relaxed), Instant::now());
    pair.active.start();
    pair.checkpoint();
    let seconds = start.elapsed().as_secs_f64();
    let share = |bytes: u64| bytes as f64 * 8.0 / 100e6 / seconds;
    println!("in {seconds:.1} s the seed had {:.2} of the line", share(bytes as u64));
    println!("TCP had {:.2}; {:?}", share(received.load(Ordering::Relaxed) - before), line.there());
    ends.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    receiver.join().unwrap();
}

#[test]
fn blocked_udp_is_said_at_both_ends_with_what_to_do() {
    let Some(line) = line(Quality { blocks_udp: true, ..Quality::default() }) else { return };
    let mut pair = Pair::across(&line);
    pair.active.configure("[link]\ncongestion = \"bbr\"\n");
    pair.standby.start();
    pair.active.start();
    pair.active.write("shared/file", "waits");
    let trouble = |host: &crate::pair::Host| host.status()["trouble"].as_str().unwrap_or_default().to_string();
    until("the active says so", || trouble(&pair.active).contains("firewall"));
    until("the standby says so", || trouble(&pair.standby).contains("firewall"));
    let (here, there) = (trouble(&pair.active), trouble(&pair.standby));
    println!("active: {here}\nstandby: {there}");
    assert!(here.contains("10.98.0.2:7420") && here.contains("UDP"), "{here}");
    assert!(there.contains("10.98.0.2:7420") && there.contains("UDP"), "{there}");
    until("it is in the standby's log", || pair.standby.log().contains("firewall"));

    line.change(|quality| quality.blocks_udp = false);
    pair.checkpoint();
    assert_eq!(fs::read(pair.standby.home.join("shared/file")).unwrap(), b"waits");
    until("the trouble is over", || trouble(&pair.standby).is_empty() && trouble(&pair.active).is_empty());
}
