//! `plan --invite` with a standby of `plan-peer`: what it measures, and what it says when the other end isn't as it should be.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use coldspare_sim::line::{FAR, Line, Quality};
use rustix::process::{Pid, Signal, kill_process};

use crate::image::Mount;
use crate::pair::{Pair, Ran, free_port, run};
use crate::plan::{figure, pair_with_home};
use crate::seed::Seed;

/// A `plan-peer` that runs.
struct Peer {
    child: Child,
    stderr: ChildStderr,
    invitation: String,
    scratch: PathBuf,
}

impl Peer {
    fn start(mut command: Command, listen: &str, scratch: &Path) -> Peer {
        command.args(["plan-peer", "--listen", listen, "--scratch"]).arg(scratch);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut stderr, mut invitation) = (child.stderr.take().unwrap(), String::new());
        if BufReader::new(child.stdout.take().unwrap()).read_line(&mut invitation).unwrap() == 0 {
            let mut said = String::new();
            stderr.read_to_string(&mut said).unwrap();
            panic!("no invitation: {said}");
        }
        Peer { child, stderr, invitation, scratch: scratch.into() }
    }

    fn on_loopback(pair: &Pair) -> Peer {
        Peer::start(pair.active.program(), &format!("127.0.0.1:{}", free_port()), &pair.dir.path().join("there"))
    }

    /// Interrupts it as a person does; what it said.
    fn end(mut self) -> String {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::INT).unwrap();
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
        assert!(!self.scratch.exists(), "the rehearsal's folder stayed");
        said
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Its daemon ends with it when it is asked, not when it is killed.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::INT);
            let _ = self.child.wait();
        }
    }
}

fn plan(pair: &Pair, invitation: &str) -> Ran {
    let mut command = pair.active.program();
    command.args(["plan", "--json", "--invite", invitation.trim(), "--home"]).arg(&pair.active.home);
    let scratch = pair.dir.path().join("scratch");
    let ran = run(command.arg("--scratch").arg(&scratch));
    assert!(!scratch.exists(), "the rehearsal's folder stayed");
    ran
}

#[test]
fn a_plan_with_a_peer_measures_what_is_between_them_and_makes_nothing_up() {
    let pair = pair_with_home();
    pair.active.write("shared/data/noise", Seed::new(1).noise(24 << 20));
    let peer = Peer::on_loopback(&pair);
    let found = plan(&pair, &peer.invitation).expect_code(0).json();
    assert!(figure(&found, "seed, to this peer") > 0.0 && figure(&found, "lag of a lone change") > 0.0);
    assert!(figure(&found, "link to the peer") > 0.0);
    assert!(found["rehearsal"]["link"]["round_trip_seconds"].is_number(), "{}", found["rehearsal"]);
    assert!(found["rehearsal"]["standby_cpu"].is_null() && found["rehearsal"]["manifest_bytes_per_entry"].is_null());
    let share = found["rehearsal"]["sent_per_repacked_byte"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&share), "a repack was to travel as {share} of itself");
    // The other end had all of it: 300 attachments and what git has.
    let invitation = peer.invitation.clone();
    plan(&pair, &invitation).expect(4, "an invitation is good for one rehearsal");
    let said = peer.end();
    let held = said.lines().find_map(|line| line.strip_prefix("held ")?.split(' ').next()?.parse::<u64>().ok());
    assert!(held.is_some_and(|entries| entries > 300), "{said}");
    // It is gone now.
    plan(&pair, &invitation).expect(3, "plan-peer");
}

#[test]
fn a_standby_in_earnest_takes_part_in_no_rehearsal() {
    let mut pair = pair_with_home();
    pair.standby.start();
    plan(&pair, &pair.invitation).expect(2, "disagree on the roots");
    // Its invitation is as good as before.
    pair.active.start();
    pair.checkpoint();
    pair.assert_equal();
}

#[test]
fn what_is_no_invitation_is_said_before_anything_is_made() {
    let pair = pair_with_home();
    plan(&pair, "coldspare1-abc").expect(2, "plan-peer");
    plan(&pair, "nonsense").expect(2, "not an invitation");
}

#[test]
fn a_peer_without_room_is_named_with_what_to_do() {
    let pair = pair_with_home();
    let small = pair.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let Some(mount) = Mount::ext4(&pair.dir.path().join("image"), 24 << 20, &small) else { return };
    pair.active.write("shared/data/noise", Seed::new(7).noise(40 << 20));
    let peer = Peer::start(pair.active.program(), &format!("127.0.0.1:{}", free_port()), &small.join("there"));
    plan(&pair, &peer.invitation).expect(5, "a --scratch that has room");
    drop(peer);
    drop(mount);
}

#[test]
fn a_plan_over_a_line_of_50_ms_has_them_in_it() {
    if !Line::is_possible() {
        return println!("skipped: needs root and /dev/net/tun");
    }
    let line = Line::new(Quality::default(), 1).unwrap();
    let mut pair = pair_with_home();
    let program = |wrapper: Vec<String>| {
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).arg(env!("CARGO_BIN_EXE_coldspare"));
        command
    };
    let peer = Peer::start(program(line.far().wrapper()), &format!("{FAR}:7420"), &pair.dir.path().join("there"));
    pair.active.wrapper = line.near().wrapper();
    let found = plan(&pair, &peer.invitation).expect_code(0).json();
    let link = &found["rehearsal"]["link"];
    println!("{link}, a lone change {} s", figure(&found, "lag of a lone change"));
    assert!(link["round_trip_seconds"].as_f64().unwrap() >= 0.05, "{link}");
    assert!(figure(&found, "lag of a lone change") >= 0.05);
    peer.end();
}
