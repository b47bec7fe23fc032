//! The buffers of a socket: what the system grants of what is asked for, and what an administrator can do.

use std::io;

use socket2::{Domain, SockRef, Socket, Type};

/// What a socket got of what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketBuffers {
    /// Bytes that were asked for, each way.
    pub asked_bytes: usize,
    /// Bytes of the receive buffer.
    pub receive_bytes: usize,
    /// Bytes of the send buffer.
    pub send_bytes: usize,
}

impl SocketBuffers {
    /// What a socket of this process would get.
    ///
    /// # Errors
    /// The system makes no socket.
    pub fn probe(asked_bytes: usize) -> io::Result<SocketBuffers> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
        SocketBuffers::set((&socket).into(), asked_bytes)
    }

    /// Asks for them; the system grants what it likes and calls that a success.
    ///
    /// With `CAP_NET_ADMIN` the system's limits don't count.
    pub(crate) fn set(socket: SockRef<'_>, asked_bytes: usize) -> io::Result<SocketBuffers> {
        use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
        if set_socket_recv_buffer_size_force(&*socket, asked_bytes).is_err() {
            socket.set_recv_buffer_size(asked_bytes)?;
        }
        if set_socket_send_buffer_size_force(&*socket, asked_bytes).is_err() {
            socket.set_send_buffer_size(asked_bytes)?;
        }
        // The kernel tells twice what it counts for content (socket(7)).
        let (receive_bytes, send_bytes) = (socket.recv_buffer_size()? / 2, socket.send_buffer_size()? / 2);
        Ok(SocketBuffers { asked_bytes, receive_bytes, send_bytes })
    }

    /// What to do so that all of it is granted; `None`: it was.
    pub fn advice(&self) -> Option<String> {
        let SocketBuffers { asked_bytes, receive_bytes, send_bytes } = *self;
        let settings: Vec<String> = [("rmem_max", receive_bytes), ("wmem_max", send_bytes)]
            .into_iter()
            .filter(|(_, granted)| *granted < asked_bytes)
            .map(|(name, _)| format!("net.core.{name} = {asked_bytes}"))
            .collect();
        (!settings.is_empty()).then(|| {
            format!(
                "the kernel grants {receive_bytes} bytes to receive and {send_bytes} to send, of {asked_bytes} each: on fast links packets \
                 are lost in bursts; write `{}` to a file below /etc/sysctl.d and run `sysctl --system`",
                settings.join("`, `")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(receive_bytes: usize, send_bytes: usize, expected: &[&str]) {
        let advice = SocketBuffers { asked_bytes: 8 << 20, receive_bytes, send_bytes }.advice();
        assert_eq!(advice.is_some(), !expected.is_empty(), "{advice:?}");
        let advice = advice.unwrap_or_default();
        for name in ["net.core.rmem_max = 8388608", "net.core.wmem_max = 8388608"] {
            assert_eq!(advice.contains(name), expected.contains(&name), "{advice}");
        }
    }

    #[test]
    fn what_caps_the_buffers_is_named() {
        check(8 << 20, 8 << 20, &[]);
        check(4 << 20, 8 << 20, &["net.core.rmem_max = 8388608"]);
        check(212_992, 212_992, &["net.core.rmem_max = 8388608", "net.core.wmem_max = 8388608"]);
    }

    #[test]
    fn what_is_granted_is_told() {
        let granted = SocketBuffers::probe(64 << 10).unwrap();
        assert_eq!(granted, SocketBuffers { asked_bytes: 64 << 10, receive_bytes: 64 << 10, send_bytes: 64 << 10 });
    }
}
