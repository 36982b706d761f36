//! Whose the other end of a TCP connection over loopback is. The kernel knows: every user of a host can connect to its
//! loopback, and without certificates that would be all that it takes to give orders.
//!
//! Read from `/proc/net/tcp` (Documentation/networking/proc_net_tcp.rst): addresses as hexadecimal words in the order of
//! the host's bytes, the user, the inode of the socket, which is 0 once nobody has it open.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The inode of a socket that was closed: the kernel need not know its user any more, and some say 0.
const CLOSED: &str = "0";

/// Refuses a connection whose other end, `from`, is on this host and belongs to another user than this process's or root.
/// `to` is this end.
///
/// # Errors
/// [`io::ErrorKind::PermissionDenied`], with what to do.
pub(crate) fn check(from: SocketAddr, to: SocketAddr) -> io::Result<()> {
    if !from.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let mut found = None;
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match std::fs::read_to_string(table) {
            Ok(text) => found = found.or_else(|| user(&text, from, to)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    match found {
        Some(user) if user == 0 || user == rustix::process::geteuid().as_raw() => Ok(()),
        Some(user) => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "it is from user {user} of this host, who is neither root nor this process's: give certificates"
            ),
        )),
        None => Err(io::Error::new(io::ErrorKind::PermissionDenied, "its other end is closed already")),
    }
}

/// The user of the end `from` of the connection to `to`, if the table has it and it is open.
fn user(table: &str, from: SocketAddr, to: SocketAddr) -> Option<u32> {
    let same = |text: &str, wanted: SocketAddr| {
        address(text).is_some_and(|it| {
            it.port() == wanted.port() && it.ip().to_canonical() == wanted.ip().to_canonical()
        })
    };
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().take(10).collect();
        let [_, local, remote, _, _, _, _, user, _, inode] = fields[..] else { return None };
        if inode != CLOSED && same(local, from) && same(remote, to) { user.parse().ok() } else { None }
    })
}

fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(ip.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (number, four) in bytes.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(8 * number)?);
            }
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn an_end_of_this_user_is_known_while_it_is_open() {
        for bind in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else { continue };
            let port = listener.local_addr().unwrap().port();
            let to: IpAddr =
                if bind == "[::1]:0" { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            let near = TcpStream::connect((to, port)).unwrap();
            let (far, from) = listener.accept().unwrap();
            check(from, far.local_addr().unwrap()).unwrap();
            // That it says no more is no reason to think otherwise.
            near.shutdown(std::net::Shutdown::Write).unwrap();
            check(from, far.local_addr().unwrap()).unwrap();
            drop(near);
            let late = check(from, far.local_addr().unwrap()).unwrap_err();
            assert_eq!(late.kind(), io::ErrorKind::PermissionDenied, "{bind}");
        }
    }

    #[test]
    fn the_user_is_that_of_the_very_connection() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n\
            0: 0100007F:9C40 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 1 1 0\n\
            1: 0100007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 2 1 0\n\
            2: 0100007F:9C41 0100007F:1F90 05 00000000:00000000 00:00000000 00000000     0        0 0 1 0\n";
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(user(table, at(40000), at(8080)), Some(1000));
        assert_eq!(user(table, at(8080), at(40000)), Some(0));
        assert_eq!(user(table, at(40001), at(8080)), None, "closed");
        assert_eq!(user(table, at(40002), at(8080)), None);
        assert_eq!(user("", at(1), at(2)), None);
        assert_eq!(user("head\n 0: 01000:1 zz 01 a b c d\n", at(1), at(2)), None);
    }
}
