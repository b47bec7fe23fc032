//! `init`: identity, control record, configuration, and the pairing of two hosts.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use coldspare_core::control::{ControlRecord, Role};
use coldspare_core::{ClusterId, Epoch, NodeId, SessionId};
use coldspare_transport::{Invitation, Secret};

use crate::config::{Brakes, Config, DEFAULT_PORT, Database, Failover, HandsOff, History, LinkSettings, Peer, Profile, Root, Send, Verify};
use crate::exit::{Code, Failure, Outcome};
use crate::roots;
use crate::state::State;

/// What both kinds of `init` are given.
#[derive(Debug)]
pub(crate) struct Init {
    /// The home.
    pub(crate) home: PathBuf,
    /// Further roots, by name.
    pub(crate) roots: Vec<(String, PathBuf)>,
    /// The configuration to write.
    pub(crate) config: PathBuf,
    /// The state folder; beside the configuration when not given.
    pub(crate) state: Option<PathBuf>,
    /// The home's exclude list.
    pub(crate) profile: Profile,
}

/// Makes this host a standby and prints an invitation for its active.
///
/// On a host that is a standby already: a new invitation, which replaces an open one.
///
/// # Errors
/// `Usage`: nothing was changed that a further run would not change in the same way.
pub(crate) fn standby(init: Init, listen: Option<&str>, advertise: Option<&str>) -> Outcome {
    let listen = listen.map(parse_listen).transpose()?;
    let (config, state) = if init.config.exists() {
        let config = Config::load(&init.config)?;
        refuse_changes(&init, listen, &config)?;
        let state = State::at(&config.state);
        let role = state.control()?.role;
        if role != Role::Standby {
            return Err(Failure::usage(format!("this host is the {}; only a standby invites", role.word())));
        }
        (config, state)
    } else {
        let config = new_config(&init, Some(listen.unwrap_or(DEFAULT_LISTEN)), None)?;
        let state = State::at(&config.state);
        refuse_initialised(&state)?;
        state.create()?;
        let cluster = ClusterId(random()?);
        roots::mark(&config.roots, cluster)?;
        state.set_control(&ControlRecord::standby(cluster, NodeId(random()?)))?;
        (config, state)
    };
    let record = state.control()?;
    let identity = state.identity_or_new()?;
    write_config(&init.config, &config)?;
    let address = advertise.map_or_else(|| advertised(&config), |a| with_port(a, config.listens_at().port()));
    // An active that was paired before is fenced once the invited one has come (R3).
    let epoch = Epoch(record.promised.0 + 1);
    let invitation = Invitation { address, standby: identity.key(), cluster: record.cluster, epoch, secret: Secret::generate() };
    invitation.check().map_err(Failure::usage)?;
    state.set_invitation(&invitation.to_string())?;
    eprintln!("standby ready to be paired; on the active host run:");
    eprintln!("  coldspare init active --home DIR --config FILE --invite {invitation}");
    eprintln!("and on this host: coldspare receive --config {}", init.config.display());
    println!("{invitation}");
    Ok(Code::Done)
}

/// Makes this host the active of the standby that invited.
///
/// # Errors
/// `Usage` before anything was written.
pub(crate) fn active(init: Init, invite: &str, listen: Option<&str>, advertise: Option<&str>) -> Outcome {
    let listen = listen.map(parse_listen).transpose()?;
    let invitation: Invitation = invite.trim().parse().map_err(Failure::usage)?;
    if init.config.exists() {
        return Err(Failure::usage(format!(
            "{} exists; a host is initialised once: to pair it anew, remove that file and its state folder first",
            init.config.display()
        )));
    }
    let mut config = new_config(&init, listen, Some(invitation.address.clone()))?;
    config.advertise = advertise.map(|a| with_port(a, config.listens_at().port()));
    let state = State::at(&config.state);
    refuse_initialised(&state)?;
    state.create()?;
    roots::mark(&config.roots, invitation.cluster)?;
    let node = NodeId(random()?);
    let boot = coldspare_os::boot_id().map_err(|e| Failure::usage(format!("the boot id can't be read: {e}")))?;
    let record = ControlRecord::active(invitation.cluster, node, invitation.epoch, SessionId(random()?), boot);
    state.set_pin(invitation.standby)?;
    state.set_invitation(&invitation.to_string())?;
    state.identity_or_new()?;
    write_config(&init.config, &config)?;
    // Last: a host is initialised once its control record is there.
    state.set_control(&record)?;
    eprintln!("active ready; the pairing is completed at the first contact with {}:", invitation.address);
    eprintln!("  coldspare send --config {}", init.config.display());
    if listen.is_none() {
        eprintln!(
            "roles can't be switched before `listen` is set in that file: where the other host reaches this one once it is the standby"
        );
    }
    Ok(Code::Done)
}

/// 16 bytes from the kernel.
///
/// # Errors
/// `Usage`: the kernel gives none.
pub(crate) fn random() -> Result<[u8; 16], Failure> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Failure::usage("the system gives no random numbers"))?;
    Ok(bytes)
}

fn new_config(init: &Init, listen: Option<SocketAddr>, peer: Option<String>) -> Result<Config, Failure> {
    let absolute = |path: &Path| std::path::absolute(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())));
    let root = |name: &str, path: &Path, profile| -> Result<Root, Failure> {
        let path = absolute(path)?;
        if !path.is_dir() {
            return Err(Failure::usage(format!("root {name:?}: {} is not a folder; make or mount it first", path.display())));
        }
        Ok(Root { name: name.into(), path, profile, exclude: Vec::new(), include: Vec::new() })
    };
    let mut roots = vec![root("home", &init.home, init.profile)?];
    for (name, path) in &init.roots {
        roots.push(root(name, path, Profile::None)?);
    }
    let state = match &init.state {
        Some(state) => absolute(state)?,
        None => absolute(&init.config.with_extension("state"))?,
    };
    let config = Config {
        path: PathBuf::new(),
        state,
        listen,
        advertise: None,
        peer: Peer { address: peer },
        roots,
        send: Send::default(),
        link: LinkSettings::default(),
        verify: Verify::default(),
        hands_off: HandsOff::default(),
        brakes: Brakes::default(),
        history: History::default(),
        database: Database::default(),
        guard: None,
        hooks: crate::config::Hooks::default(),
        health: crate::config::HealthSettings::default(),
        failover: Failover::default(),
    };
    let text = toml::to_string(&config).map_err(Failure::usage)?;
    Config::parse(&text).map_err(Failure::usage)
}

fn write_config(path: &Path, config: &Config) -> Result<(), Failure> {
    if path.exists() {
        return Ok(());
    }
    // Only what differs from the defaults: the file is for a person to edit.
    let mut text = String::from("# coldspare; every key and default: docs/configuration.md\n\n");
    let quoted = |p: &Path| toml::Value::String(p.to_string_lossy().into_owned()).to_string();
    text += &format!("state = {}\n", quoted(&config.state));
    if let Some(listen) = config.listen {
        text += &format!("listen = \"{listen}\"\n");
    }
    if let Some(address) = &config.advertise {
        text += &format!("advertise = {}\n", toml::Value::String(address.clone()));
    }
    if let Some(address) = &config.peer.address {
        text += &format!("\n[peer]\naddress = {}\n", toml::Value::String(address.clone()));
    }
    for root in &config.roots {
        text += &format!("\n[[root]]\nname = \"{}\"\npath = {}\n", root.name, quoted(&root.path));
        if root.profile == Profile::Bitbucket {
            text += "profile = \"bitbucket\"\n";
        }
    }
    Config::parse(&text).map_err(|e| Failure::usage(format!("the configuration can't be written: {e}")))?;
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| Failure::usage(format!("{}: {e}", dir.display())))?;
    }
    std::fs::write(path, text).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

/// A standby that exists keeps its configuration: what is given besides would be ignored in silence.
fn refuse_changes(init: &Init, listen: Option<SocketAddr>, config: &Config) -> Result<(), Failure> {
    let given = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let is_home = config.roots.first().is_some_and(|root| root.path == given(&init.home));
    let is_state = init.state.as_ref().is_none_or(|state| config.state == given(state));
    let is_listen = listen.is_none_or(|listen| listen == config.listens_at());
    let are_roots = init.roots.iter().all(|(name, path)| config.roots.iter().any(|r| r.name == *name && r.path == given(path)));
    if is_home && is_state && is_listen && are_roots {
        return Ok(());
    }
    Err(Failure::usage(format!(
        "{} exists and says otherwise; edit it, and give only --home and --config for a new invitation",
        init.config.display()
    )))
}

fn refuse_initialised(state: &State) -> Result<(), Failure> {
    if state.is_initialised() {
        return Err(Failure::usage(
            "the state folder holds a node already; choose another with --state, or remove it if that node is no more",
        ));
    }
    Ok(())
}

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), DEFAULT_PORT);

fn parse_listen(text: &str) -> Result<SocketAddr, Failure> {
    let full = with_port(text, DEFAULT_PORT);
    full.parse().map_err(|_| Failure::usage(format!("--listen {text:?} is not an address such as 0.0.0.0:{DEFAULT_PORT}")))
}

fn with_port(address: &str, port: u16) -> String {
    let has_port = match address.rsplit_once(':') {
        Some((host, port)) => port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')),
        None => false,
    };
    if has_port { address.into() } else { format!("{address}:{port}") }
}

/// The address that others reach this host at, as far as it can be known.
pub(crate) fn advertised(config: &Config) -> String {
    if let Some(address) = &config.advertise {
        return address.clone();
    }
    let listen = config.listens_at();
    if !listen.ip().is_unspecified() {
        return listen.to_string();
    }
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    format!("{name}:{}", listen.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_added_where_they_are_missing() {
        assert_eq!(with_port("standby", 7420), "standby:7420");
        assert_eq!(with_port("standby:1", 7420), "standby:1");
        assert_eq!(with_port("[::1]:1", 7420), "[::1]:1");
        assert_eq!(with_port("[::1]", 7420), "[::1]:7420");
        assert!(parse_listen("nonsense").is_err());
        assert_eq!(parse_listen("127.0.0.1").unwrap().port(), 7420);
    }
}
