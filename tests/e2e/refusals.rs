//! What is wrong is refused, with the exit code that scripts rely on and words that help.

use std::fs;
use std::net::UdpSocket;

use crate::pair::{Host, Pair};

#[test]
fn an_unknown_key_in_the_configuration_names_its_line() {
    let pair = Pair::new();
    let text = fs::read_to_string(pair.active.config()).unwrap();
    fs::write(pair.active.config(), format!("{text}colour = \"blue\"\n")).unwrap();
    let line = format!("line {}", text.lines().count() + 1);
    pair.active.run(&["send", "--once"]).expect(2, &line);
    pair.active.run(&["check"]).expect(2, "colour");
}

#[test]
fn an_unreachable_standby_is_named_with_its_address() {
    let pair = Pair::new();
    pair.active.run(&["send", "--once"]).expect(3, &format!("127.0.0.1:{}", pair.port));
}

#[test]
fn a_port_in_use_is_named() {
    let pair = Pair::new();
    let _taken = UdpSocket::bind(("127.0.0.1", pair.port)).unwrap();
    pair.standby.run(&["receive"]).expect(2, &pair.port.to_string());
}

#[test]
fn an_invitation_is_good_for_one_active() {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.send_once();
    let second = Host::new(pair.dir.path(), "second", "send");
    second.init_active(&pair.invitation).expect_code(0);
    second.run(&["send", "--once"]).expect(4, "invitation");
    // The first is still welcome.
    pair.send_once();
}

#[test]
fn a_mangled_invitation_is_refused_before_anything_is_written() {
    let pair = Pair::new();
    let host = Host::new(pair.dir.path(), "second", "send");
    let mut mangled = pair.invitation.clone();
    let last = mangled.pop().unwrap();
    mangled.push(if last == 'a' { 'b' } else { 'a' });
    for text in [mangled.as_str(), "nonsense", &pair.invitation[..pair.invitation.len() / 2]] {
        host.init_active(text).expect(2, "invitation");
    }
    assert!(!host.config().exists() && !host.state().exists());
}

#[test]
fn a_standby_with_another_key_is_refused() {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.send_once();
    pair.standby.kill();
    forget(&pair.standby);
    fs::remove_dir_all(pair.standby.state()).unwrap();
    pair.standby.init_standby(pair.port);
    pair.standby.start();
    pair.active.run(&["send", "--once"]).expect(4, "key");
}

#[test]
fn a_standby_of_another_cluster_is_refused() {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.send_once();
    pair.standby.kill();
    forget(&pair.standby);
    // The same keys on both sides, but a cluster made anew.
    for name in ["control", "manifest.redb"] {
        fs::remove_file(pair.standby.state().join(name)).unwrap();
    }
    pair.standby.init_standby(pair.port);
    pair.standby.start();
    pair.active.run(&["send", "--once"]).expect(4, "cluster");
}

#[test]
fn each_command_runs_on_its_host_only() {
    let pair = Pair::new();
    pair.active.run(&["receive"]).expect(4, "not a standby");
    pair.standby.run(&["send", "--once"]).expect(4, "not the active");
    pair.active.run(&["verify"]).expect(2, "runs on the standby");
    pair.active.run(&["checkpoint"]).expect(3, "no daemon");
}

#[test]
fn a_second_daemon_is_refused() {
    let mut pair = Pair::new();
    pair.standby.start();
    pair.standby.run(&["receive"]).expect(2, "another coldspare daemon");
}

/// Removes the configuration and the markers of a host.
fn forget(host: &Host) {
    fs::remove_file(host.config()).unwrap();
    for root in [&host.home, &host.store] {
        fs::remove_dir_all(root.join(".coldspare")).unwrap();
    }
}
