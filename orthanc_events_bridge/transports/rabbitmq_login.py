"""What it means that RabbitMQ doesn't let us in."""

from __future__ import annotations

import ssl

from aiormq.exceptions import AMQPError, AuthenticationError

from orthanc_events_bridge.errors import NotConnectedError, TransportConfigurationError, TransportError
from orthanc_events_bridge.transports.rabbitmq_amqp import ClosedError, chain, words
from orthanc_events_bridge.transports.rabbitmq_options import RabbitOptions


class HungUpError(TransportConfigurationError):
    """The server ended the connection in place of answering the login."""


def not_connected(
    url: str, options: RabbitOptions, error: BaseException, *, vhost: str, encrypted: bool
) -> TransportError:
    """Which of our errors a failed attempt to connect is.

    :param encrypted: the connection was open, and with TLS.
    """
    place = f"RabbitMQ at {url}"
    text = words(error)
    for cause in chain(error):
        if isinstance(cause, ssl.SSLError):
            return TransportConfigurationError(
                f"{place}: TLS failed: {words(cause)}",
                "check tls.ca_file, the names and dates in the certificates, and tls.cert_file",
            )
    if isinstance(error, AuthenticationError):
        return TransportConfigurationError(
            f"{place} does not offer to log in by {options.auth.upper()}, but by {error.args[0]}",
            "set auth to plain, or enable the plugin rabbitmq_auth_mechanism_ssl and its mechanism at the server",
        )
    if isinstance(error, ClosedError):
        if error.code == 403:
            return TransportConfigurationError(
                f"{place} refuses the credentials: {text}",
                "check user and password, or the certificate; RabbitMQ takes guest from its own machine only",
            )
        if error.code == 530:
            return TransportConfigurationError(
                f"{place} does not let us into the virtual host {vhost}: {text}",
                "check the virtual host in the URL, and the user's permissions and limits there",
            )
    if isinstance(error, TimeoutError):
        text = f"no answer within {options.connect_timeout:g} s"
    elif encrypted and isinstance(error, AMQPError | OSError):
        # From TLS 1.3 on a server looks at our certificate when the handshake is over for us.
        return HungUpError(
            f"{place} ended the connection while we logged in: {text}",
            "check tls.cert_file if it verifies its clients; see its log",
        )
    if isinstance(error, AMQPError | OSError | ClosedError):
        return NotConnectedError(f"{place} can't be reached: {text}", "start RabbitMQ, or check `servers`")
    return TransportConfigurationError(f"{place}: {type(error).__name__}: {text}", "check the transport's options")
