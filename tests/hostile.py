"""Twenty texts that must appear as they are written, in pages, reports, charts and HTML views."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "--><b>",
    "<img src=x onerror=alert(3)>",
    '"><svg onload=alert(4)>',
    "' onmouseover='alert(5)",
    "javascript:alert(6)",
    "</style><b>7</b>",
    "]]><x>",
    "{{constructor.constructor('alert(8)')()}}",
    "${alert(9)}",
    "&lt;b&gt;10&amp;",
    "<a href='//example.org/11'>x</a>",
    "</title><b>12",
    "\u2028alert(13)\u2029",
    "\u202eevil 14",
    "a\x00b\x1b[31m15",
    "\ud800 16",
    "url(//example.org/17) expression(alert(17))",
)
